"""Walk the plan: read, survey, passes, apply, write; then publish. Nothing half-done looks done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from tqdm import tqdm

from streammerge._version import __version__
from streammerge.budget import DEFAULT_MAX_RAM
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import CARD_FILE, MANIFEST_FILE, Checkpoint, torch_dtype
from streammerge.checkpoints.writer import CheckpointWriter, check_output
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError, RecipeError
from streammerge.fisher.store import FISHER_FILE, FisherRecord, check_same_base, open_fisher
from streammerge.methods.api import Method, RowBlock, TensorContext, Unit
from streammerge.plan import MergePlan, make_plan
from streammerge.recipe import Recipe
from streammerge.report import manifest, model_card, resolved_recipe
from streammerge.stream import Input, Inputs, RowReader


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    max_ram: int = DEFAULT_MAX_RAM,
    threads: int | None = None,
    device: str | None = None,
    save_fisher: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Merge fine-tuned models into a base model and write a checkpoint that transformers loads.

    Interrupted, the same call goes on behind the last finished shard.

    Args:
        recipe: what to merge.
        out: the output folder; new, empty, or left unfinished by the same call.
        max_ram: bytes for buffers and temporaries of the merge, on top of what importing torch takes.
        threads: workers; the processors by default, at most 8.
        device: where a Fisher pass runs: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        save_fisher: folder to keep a newly measured Fisher in, for other merges of the same base.
        overwrite: replace a finished merge in `out`, or start an unfinished one anew.
        progress: show progress bars on standard error.

    Returns:
        The manifest, as written to `streammerge.json`.

    Raises:
        StreammergeError: see `streammerge.errors`. Bad input leaves nothing behind in `out`.
    """
    out = Path(out)
    with ExitStack() as stack:
        plan = stack.enter_context(make_plan(recipe, max_ram=max_ram, threads=threads))
        check_output(out, [model.folder for model in (plan.base, *plan.experts)], overwrite)
        sources = _sources(plan)
        if plan.fisher is not None:
            check_same_base(plan.fisher[1], plan.base, sources[0]["fingerprint"])
        if save_fisher is not None and not (Path(save_fisher) / FISHER_FILE).is_file():
            check_output(Path(save_fisher), [plan.base.folder, out], overwrite=False)
        identity = {"version": __version__, "recipe": resolved_recipe(plan), "sources": sources}
        writer = stack.enter_context(CheckpointWriter(out, plan.shards, identity, fresh=overwrite))
        try:
            if plan.method.needs_fisher and plan.fisher is None:
                folder = Path(save_fisher) if save_fisher else writer.work / "fisher"
                plan.fisher = _measured_fisher(plan, folder, sources[0]["fingerprint"], device, progress)
                stack.enter_context(plan.fisher[0])
            method, entries = _Run(plan, writer, progress).run()
            result = manifest(plan, method, sources, entries, writer.finished)
            files: dict[str, bytes | Path] = {name: plan.base.folder / name for name in plan.base.side_files()}
            files |= {CARD_FILE: model_card(plan, result).encode()}
            result["files"] = sorted({*files, MANIFEST_FILE, *result["files"]})
            writer.publish(files | {MANIFEST_FILE: _as_json(result)})
        except (CheckpointError, RecipeError):
            writer.discard()  # the input is at fault, running again would not help
            raise
    return result


class _Run:
    """The survey and the merge of one plan, on a few worker threads with a reader each."""

    def __init__(self, plan: MergePlan, writer: CheckpointWriter, progress: bool) -> None:
        self.plan, self.writer, self.progress = plan, writer, progress
        self.method: Method = plan.method
        self.entries: dict[str, dict[str, Any]] = {}

    def run(self) -> tuple[Method, dict[str, dict[str, Any]]]:
        """Merge everything; the method as it was used, and each tensor's report."""
        for shard in self.writer.finished.values():
            self.entries |= shard["tensors"]
        surveyed = [Unit(tensor.name, (tensor,)) for tensor in self.plan.surveyed]
        units = [u for u in self.plan.units if not all(self.writer.is_finished(t.name) for t in u.tensors)]
        with _single_threaded_torch():
            if surveyed:
                surveys: dict[TensorContext, Any] = {}
                self._work("Survey", surveyed, self.plan.survey_bytes, lambda r, unit: self._survey(r, unit, surveys))
                fisher = self.plan.fisher[1] if self.plan.fisher else None
                self.method = self.method.prepared({u.tensors[0]: surveys[u.tensors[0]] for u in surveyed}, fisher)
            self._work("Merge", units, self.plan.merge_bytes, self._merge)
            self.writer.wait()
        return self.method, {tensor.name: self.entries[tensor.name] for tensor in self.plan.contexts}

    def _work(
        self, label: str, units: Sequence[Unit], size: Callable[[Unit], int], do: Callable[[RowReader, Unit], None]
    ) -> None:
        """Hand the units, in order, to the workers; the first error stops all. `size`: bytes a unit reads."""
        queue, lock, stop = iter(units), Lock(), Event()
        total = sum(size(unit) for unit in units)
        bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not self.progress)

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def loop() -> None:
            reader = RowReader(self.plan.budget.buffer_bytes, self.plan.recipe.allow_nonfinite, advance)
            while not stop.is_set():
                with lock:
                    unit = next(queue, None)
                if unit is None:
                    return
                try:
                    do(reader, unit)
                except BaseException:
                    stop.set()
                    raise
                advance(size(unit) - reader.bytes_read)  # a pass that was not needed

        with bar, ThreadPoolExecutor(self.plan.budget.workers, "streammerge") as pool:
            try:
                for future in [pool.submit(loop) for _ in range(self.plan.budget.workers)]:
                    future.result()
            finally:
                stop.set()

    def _survey(self, reader: RowReader, unit: Unit, surveys: dict[TensorContext, Any]) -> None:
        tensor = unit.tensors[0]
        survey = self.method.survey(tensor)
        assert survey is not None  # only such tensors are in the list
        reader.open(unit, {tensor.name: self._inputs(tensor, experts=True, fisher=survey.reads_fisher)})
        state = survey.start(unit, {})
        for block in reader.blocks():
            survey.update(state, block)
        surveys[tensor] = survey.finish(state)

    def _merge(self, reader: RowReader, unit: Unit) -> None:
        action = self.plan.actions[unit.tensors[0].name]
        inputs = {
            tensor.name: self._inputs(
                tensor,
                experts=action != "copy",
                fisher=action == "merge" and self.method.reads_fisher(tensor),
            )
            for tensor in unit.tensors
        }
        reader.open(unit, inputs)
        results: dict[str, Any] = {}
        if action == "merge":
            for step in self.method.passes(unit):
                state = step.start(unit, results)
                if state is not None:
                    for block in reader.blocks():
                        step.update(state, block)
                    results[step.name] = step.finish(state)
        for block in reader.blocks():
            if action == "same":
                self._require_same(block, inputs[block.tensor.name])
            merged = self.method.apply(block, results) if action == "merge" else block.stored[0]
            self._write(block, merged)
        for tensor in unit.tensors:
            if not self.writer.is_finished(tensor.name):
                report = self.method.report(tensor, results) if action == "merge" else {}
                facts = {"block": tensor.block, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                entry = {**facts, "numel": tensor.numel, **_scalars(report)}
                self.entries[tensor.name] = entry
                self.writer.complete(tensor.name, entry)

    def _write(self, block: RowBlock, merged: torch.Tensor) -> None:
        name = block.tensor.name
        if not self.writer.is_finished(name):
            stored = merged.to(torch_dtype(block.tensor.dtype)).contiguous()
            self.writer.write(name, block.row * block.tensor.columns * stored.element_size(), as_bytes(stored))

    def _inputs(self, tensor: TensorContext, experts: bool, fisher: bool) -> Inputs:
        plan, name = self.plan, tensor.name
        models = zip(plan.experts, plan.matches, strict=True)
        return Inputs(
            Input(plan.base, plan.base.tensors[name]),
            tuple(Input(model, match.tensors[name]) for model, match in models) if experts else (),
            Input(plan.fisher[0], plan.fisher[0].info(name)) if fisher and plan.fisher else None,
        )

    def _require_same(self, block: RowBlock, inputs: Inputs) -> None:
        """Integers cannot be averaged; where the models disagree on one there is no right answer."""
        base, *others = (values.contiguous().view(torch.uint8) for values in block.stored)
        for values, source in zip(others, inputs.experts, strict=True):
            if not torch.equal(base, values):
                raise IncompatibleCheckpointsError(
                    f"these models cannot be merged into {self.plan.base.id}:",
                    [f"{source.model.id}: tensor {block.tensor.name!r} ({block.tensor.dtype}) holds other values"],
                )


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """One torch thread per worker: the workers are the parallelism, and sums are cut the same way always."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measured_fisher(
    plan: MergePlan, folder: Path, fingerprint: str, device: str | None, progress: bool
) -> tuple[Checkpoint, FisherRecord]:
    """The Fisher in `folder`: the one an interrupted run left there, else a new one."""
    if not (folder / FISHER_FILE).is_file():
        from streammerge.fisher.measure import default_device, measure  # imports transformers

        measure(
            plan.base,
            folder,
            plan.recipe.fisher,
            device=device or default_device(),
            max_shard_bytes=plan.recipe.max_shard_bytes,
            progress=progress,
        )
    fisher = open_fisher(folder, plan.base, plan.recipe.fisher, [tensor.name for tensor in plan.surveyed])
    try:
        check_same_base(fisher[1], plan.base, fingerprint)
    except BaseException:
        fisher[0].close()
        raise
    return fisher


def _sources(plan: MergePlan) -> list[dict[str, Any]]:
    models = [("base", plan.base), *(("expert", expert) for expert in plan.experts)]
    if plan.fisher is not None:
        models.append(("fisher", plan.fisher[0]))
    return [
        {"role": role, "id": model.id, "revision": model.revision, "fingerprint": model.fingerprint()}
        for role, model in models
    ]


def _scalars(report: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one become their value: with one expert, one number."""
    return {k: v[0] if isinstance(v, (list, tuple)) and len(v) == 1 else v for k, v in report.items()}


def _as_json(value: Any) -> bytes:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
