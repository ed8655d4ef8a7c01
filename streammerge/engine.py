"""Walk the plan's units: read, survey, passes, apply, write; on a few worker threads, one unit each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any

import torch

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.room import DiskRoom
from streammerge.errors import IncompatibleCheckpointsError
from streammerge.heap import temporaries_kept
from streammerge.methods.api import Method, RowBlock, TensorContext, Unit
from streammerge.plan import MergePlan
from streammerge.progress import progress_bar
from streammerge.row_reader import Input, Inputs, RowReader, batches
from streammerge.row_writer import RowWriter, Writer
from streammerge.timeline import Timeline
from streammerge.workers import single_threaded_torch


class Engine:
    """The survey and the merge of one plan, on a few worker threads with a reader each.

    Args:
        writer: takes the merged rows.
        room: lets a unit be merged once there is room on disk for what it writes; any time by default.
        label: what is done, for the progress bar.
        prepared: the method knowing all that a survey would tell; then there is none.
        timeline: gets the phases "survey" and "merge".
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
        timeline: Timeline | None = None,
    ) -> None:
        self.plan, self.writer, self.progress, self.label = plan, writer, progress, label
        self.room = room
        self.prepared = prepared
        self.timeline = timeline or Timeline()
        self.method: Method = prepared or plan.method

    def run(self) -> tuple[Method, dict[str, dict[str, Any]]]:
        """Merge everything; the method as it was used, and each tensor's report."""
        surveyed = [Unit(tensor.name, (tensor,)) for tensor in self.plan.surveyed if self.prepared is None]
        left = {u.key: [t.name for t in u.tensors if not self.writer.is_complete(t.name)] for u in self.plan.units}
        units = [unit for unit in self.plan.units if left[unit.key]]
        if self.room is not None:
            self.room.expect({unit.key: left[unit.key] for unit in units})
        temporaries_kept()
        with single_threaded_torch():
            surveys: dict[TensorContext, Any] = {}
            if surveyed:
                with self.timeline.phase("survey"):
                    self._work(
                        *("Survey", surveyed, self.plan.survey_bytes, self._survey_inputs),
                        lambda reader, unit, stop: self._survey(reader, unit, surveys),
                    )
            if self.prepared is None:
                in_order = {unit.tensors[0]: surveys[unit.tensors[0]] for unit in surveyed}
                records = [record for _, record in self.plan.fishers]
                self.method = self.method.prepared(in_order, records, self.plan.calibrated)
            with self.timeline.phase("merge"):
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
                        advance(max(size(unit) - reader.bytes_read, 0))  # a pass that was not needed
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
        reader.open(unit, once=True)
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
        if action == "merge":
            if self.plan.calibrated is not None:
                results["calibrated"] = {tensor.name: self.plan.calibrated.of(tensor.name) for tensor in unit.tensors}
            for step in passes:
                state = step.start(unit, results)
                if state is not None:
                    for block in reader.sample() if step.samples else reader.blocks() if step.reads_rows else ():
                        step.update(state, block)
                    results[step.name] = step.finish(state)
        out = RowWriter(self.writer, self.plan.recipe.allow_nonfinite)
        complete = {tensor.name for tensor in unit.tensors if self.writer.is_complete(tensor.name)}
        for block in reader.blocks():
            if action == "same":
                self._require_same(block, inputs[block.tensor.name])
            merged = self.method.apply(block, results) if action == "merge" else block.stored[0]
            if block.tensor.name not in complete:
                out.add(block, merged)
                if block.row + len(merged) == block.tensor.rows:
                    out.flush()
        for tensor in unit.tensors:
            if tensor.name not in complete:
                report = self.method.report(tensor, results) if action == "merge" else {}
                facts = {"block": tensor.block, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                counted = {"nonfinite": out.nonfinite[tensor.name]} if out.nonfinite[tensor.name] else {}
                entry = {**facts, "numel": tensor.numel, **_scalars(report), **counted}
                self.writer.complete(tensor.name, entry)

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
