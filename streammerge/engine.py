"""Walk the plan's units: read, survey, passes, apply, write; on a few worker threads, one unit each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, count_nonfinite, torch_dtype
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.room import DiskRoom
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError
from streammerge.heap import one_heap
from streammerge.methods.api import Method, RowBlock, TensorContext, Unit
from streammerge.plan import MergePlan
from streammerge.progress import progress_bar
from streammerge.stream import Input, Inputs, RowReader, batches
from streammerge.workers import single_threaded_torch


class Writer(Protocol):
    """What takes the merged rows: a `CheckpointWriter`, or what compares them with one that is there."""

    @property
    def entries(self) -> Mapping[str, Any]: ...

    def is_complete(self, name: str) -> bool: ...

    def write(self, name: str, start: int, data: memoryview) -> None: ...

    def complete(self, name: str, entry: Mapping[str, Any]) -> None: ...

    def wait(self) -> None: ...


class Engine:
    """The survey and the merge of one plan, on a few worker threads with a reader each.

    Args:
        writer: takes the merged rows.
        room: lets a unit be merged once there is room on disk for what it writes; any time by default.
        label: what is done, for the progress bar.
        prepared: the method knowing all that a survey would tell; then there is none.
    """

    def __init__(
        self,
        plan: MergePlan,
        writer: Writer,
        progress: bool,
        room: DiskRoom | None = None,
        *,
        label: str = "Merge",
        prepared: Method | None = None,
    ) -> None:
        self.plan, self.writer, self.progress, self.label = plan, writer, progress, label
        self.room = room
        self.prepared = prepared
        self.method: Method = prepared or plan.method

    def run(self) -> tuple[Method, dict[str, dict[str, Any]]]:
        """Merge everything; the method as it was used, and each tensor's report."""
        surveyed = [Unit(tensor.name, (tensor,)) for tensor in self.plan.surveyed if self.prepared is None]
        left = {u.key: [t.name for t in u.tensors if not self.writer.is_complete(t.name)] for u in self.plan.units}
        units = [unit for unit in self.plan.units if left[unit.key]]
        if self.room is not None:
            self.room.expect({unit.key: left[unit.key] for unit in units})
        one_heap()  # a heap for every thread would set aside 64 MiB of addresses each, which a limit on them counts
        with single_threaded_torch():
            surveys: dict[TensorContext, Any] = {}
            if surveyed:
                self._work(
                    *("Survey", surveyed, self.plan.survey_bytes, self._survey_inputs),
                    lambda reader, unit, stop: self._survey(reader, unit, surveys),
                )
            if self.prepared is None:
                in_order = {unit.tensors[0]: surveys[unit.tensors[0]] for unit in surveyed}
                records = [record for _, record in self.plan.fishers]
                self.method = self.method.prepared(in_order, records, self.plan.calibrated)
            self._work(self.label, units, self.plan.merge_bytes, self._merge_inputs, self._merge_in_room)
            self.writer.wait()
        return self.method, {tensor.name: self.writer.entries[tensor.name] for tensor in self.plan.contexts}

    def _work(
        self,
        label: str,
        units: Sequence[Unit],
        size: Callable[[Unit], int],
        inputs: Callable[[Unit], Mapping[str, Inputs]],
        do: Callable[[RowReader, Unit, Event], None],
    ) -> None:
        """Hand the units, in order, to the workers; the first error stops all, and sets the event that `do` gets.

        `size`: bytes a unit reads.
        """
        lock, stop = Lock(), Event()
        queue = batches(((unit, inputs(unit)) for unit in units), self.plan.budget.buffer_bytes)
        total = sum(size(unit) for unit in units)
        bar = progress_bar(total, label, "B", self.progress)

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def loop() -> None:
            plan = self.plan
            reader = RowReader(plan.budget.buffer_bytes, plan.recipe.allow_nonfinite, advance, again=label == "Survey")
            while not stop.is_set():
                with lock:
                    batch = next(queue, None)
                if batch is None:
                    return
                try:
                    reader.load(batch)
                    for unit, _ in batch:
                        if stop.is_set():
                            return
                        do(reader, unit, stop)
                        advance(size(unit) - reader.bytes_read)  # a pass that was not needed
                except BaseException:
                    stop.set()
                    raise

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
        reader.open(unit)
        state = survey.start(unit, {})
        for block in reader.blocks():
            survey.update(state, block)
        surveys[tensor] = survey.finish(state)

    def _merge_in_room(self, reader: RowReader, unit: Unit, stop: Event) -> None:
        if self.room is None:
            self._merge(reader, unit)
        elif self.room.enter(unit.key, stop):
            self._merge(reader, unit)
            self.room.leave(unit.key)

    def _merge(self, reader: RowReader, unit: Unit) -> None:
        action = self.plan.actions[unit.tensors[0].name]
        passes = list(self.method.passes(unit)) if action == "merge" else []
        inputs = reader.open(unit, once=not any(step.reads_rows for step in passes))
        results: dict[str, Any] = {}
        nonfinite: Counter[str] = Counter()
        if action == "merge":
            if self.plan.calibrated is not None:
                results["calibrated"] = {tensor.name: self.plan.calibrated.of(tensor.name) for tensor in unit.tensors}
            for step in passes:
                state = step.start(unit, results)
                if state is not None:
                    for block in reader.blocks() if step.reads_rows else ():
                        step.update(state, block)
                    results[step.name] = step.finish(state)
        for block in reader.blocks():
            if action == "same":
                self._require_same(block, inputs[block.tensor.name])
            merged = self.method.apply(block, results) if action == "merge" else block.stored[0]
            nonfinite[block.tensor.name] += self._write(block, merged)
        for tensor in unit.tensors:
            if not self.writer.is_complete(tensor.name):
                report = self.method.report(tensor, results) if action == "merge" else {}
                facts = {"block": tensor.block, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                counted = {"nonfinite": nonfinite[tensor.name]} if nonfinite[tensor.name] else {}
                entry = {**facts, "numel": tensor.numel, **_scalars(report), **counted}
                self.writer.complete(tensor.name, entry)

    def _write(self, block: RowBlock, merged: Tensor) -> int:
        """Write the rows in the output's dtype; how many of the values are NaN or Inf, where these are let through."""
        name, dtype = block.tensor.name, block.tensor.dtype
        if self.writer.is_complete(name):
            return 0
        stored = merged.to(torch_dtype(dtype)).contiguous()
        bad = count_nonfinite(stored) if stored.is_floating_point() else 0
        if bad and not self.plan.recipe.allow_nonfinite:
            raise CheckpointError(
                f"tensor {name!r}: {bad} of its merged values are too large for {dtype} (NaN or Inf): take smaller "
                "coefficients, or let them through with --allow-nonfinite"
            )
        self.writer.write(name, block.row * block.tensor.columns * stored.element_size(), as_bytes(stored))
        return bad

    def _survey_inputs(self, unit: Unit) -> dict[str, Inputs]:
        (tensor,) = unit.tensors
        survey = self.method.survey(tensor)
        fisher = survey is not None and survey.reads_fisher
        return {tensor.name: self._inputs(tensor, self.plan.expert_inputs(tensor), fisher)}

    def _merge_inputs(self, unit: Unit) -> dict[str, Inputs]:
        return {
            tensor.name: self._inputs(tensor, self.plan.expert_inputs(tensor), self.plan.reads_fisher(tensor))
            for tensor in unit.tensors
        }

    def _inputs(self, tensor: TensorContext, experts: Sequence[tuple[Checkpoint, TensorInfo]], fisher: bool) -> Inputs:
        plan, name = self.plan, tensor.name
        return Inputs(
            Input(plan.base, plan.base.tensors[name]),
            tuple(Input(model, info) for model, info in experts),
            tuple(Input(model, model.info(name)) for model, _ in plan.fishers) if fisher else (),
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


def _scalars(report: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one become their value: with one expert, one number."""
    return {k: v[0] if isinstance(v, (list, tuple)) and len(v) == 1 else v for k, v in report.items()}
