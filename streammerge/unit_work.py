"""What is done with one unit: its survey, or its merge. Pure work: what comes of it is told, not kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.room import DiskRoom
from streammerge.errors import IncompatibleCheckpointsError
from streammerge.methods.api import Method, RowBlock, TensorContext, Unit
from streammerge.plan import MergePlan
from streammerge.row_reader import Input, Inputs, RowReader
from streammerge.row_writer import RowWriter, Writer


@dataclass(frozen=True)
class Surveyed:
    """What the survey of a tensor found."""

    tensor: TensorContext
    result: Any


@dataclass(frozen=True)
class Merged:
    """A tensor is written: its entry in the manifest, and what the writer returned for each of its pieces."""

    name: str
    entry: Mapping[str, Any]
    written: Sequence[Any]


class UnitWork(ABC):
    """Work on the units of a plan, in any order.

    Args:
        plan: the plan.
        method: the method, knowing all that it needs to know by now.
    """

    again: bool  # whether all that is read will be read again

    def __init__(self, plan: MergePlan, method: Method) -> None:
        self.plan, self.method = plan, method

    @abstractmethod
    def inputs(self, unit: Unit) -> dict[str, Inputs]:
        """What is read of each of the unit's tensors."""

    @abstractmethod
    def size(self, unit: Unit) -> int:
        """How many bytes the unit reads at most."""

    @abstractmethod
    def do(self, reader: RowReader, unit: Unit, tell: Callable[[Surveyed | Merged], object], stop: Event) -> None:
        """Read the unit, which the reader has loaded, and tell what comes of it.

        Args:
            stop: set where it is not wanted any more; what waits for something else gives up then.
        """

    def _inputs(self, tensor: TensorContext, experts: Sequence[tuple[Checkpoint, TensorInfo]], fisher: bool) -> Inputs:
        plan, name = self.plan, tensor.name
        return Inputs(
            Input(plan.base, plan.base.tensors[name]),
            tuple(Input(model, info) for model, info in experts),
            tuple(Input(model, model.info(name)) for model, _ in plan.fishers) if fisher else (),
        )


class Survey(UnitWork):
    """Looks at tensors before anything is merged, one a unit."""

    again = True

    def inputs(self, unit: Unit) -> dict[str, Inputs]:
        (tensor,) = unit.tensors
        survey = self.method.survey(tensor)
        fisher = survey is not None and survey.reads_fisher
        return {tensor.name: self._inputs(tensor, self.plan.expert_inputs(tensor), fisher)}

    def size(self, unit: Unit) -> int:
        return self.plan.survey_bytes(unit)

    def do(self, reader: RowReader, unit: Unit, tell: Callable[[Surveyed | Merged], object], stop: Event) -> None:
        (tensor,) = unit.tensors
        survey = self.method.survey(tensor)
        assert survey is not None  # only such tensors are in the list
        reader.open(unit, once=True)
        state = survey.start(unit, {})
        for block in reader.blocks():
            survey.update(state, block)
        tell(Surveyed(tensor, survey.finish(state)))


class Merge(UnitWork):
    """Merges units: passes, apply, write.

    Args:
        writer: takes the merged rows.
        room: lets a unit be merged once there is room on disk for what it writes; any time by default.
    """

    again = False

    def __init__(self, plan: MergePlan, method: Method, writer: Writer, room: DiskRoom | None = None) -> None:
        super().__init__(plan, method)
        self.writer, self.room = writer, room

    def inputs(self, unit: Unit) -> dict[str, Inputs]:
        return {
            tensor.name: self._inputs(tensor, self.plan.expert_inputs(tensor), self.plan.reads_fisher(tensor))
            for tensor in unit.tensors
        }

    def size(self, unit: Unit) -> int:
        return self.plan.merge_bytes(unit)

    def do(self, reader: RowReader, unit: Unit, tell: Callable[[Surveyed | Merged], object], stop: Event) -> None:
        if self.room is None:
            self._merge(reader, unit, tell)
        elif self.room.enter(unit.key, stop):
            self._merge(reader, unit, tell)
            self.room.leave(unit.key)

    def _merge(self, reader: RowReader, unit: Unit, tell: Callable[[Merged], object]) -> None:
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
                if block.row + merged.shape[0] == block.tensor.rows:
                    out.flush()
        for tensor in unit.tensors:
            if tensor.name not in complete:
                report = self.method.report(tensor, results) if action == "merge" else {}
                facts = {"block": tensor.block, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                counted = {"nonfinite": out.nonfinite[tensor.name]} if out.nonfinite[tensor.name] else {}
                entry = {**facts, "numel": tensor.numel, **_scalars(report), **counted}
                tell(Merged(tensor.name, entry, out.written.get(tensor.name, ())))

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
