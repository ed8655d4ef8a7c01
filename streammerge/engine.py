"""Walk the plan's units: read, survey, passes, apply, write; by a few workers, one unit each.

The workers are forks of this process where all inputs are local files, so that none waits for another's interpreter
lock; and threads where bytes come over the network, whose pace is what counts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from time import monotonic
from typing import Any

from tqdm import tqdm

from streammerge.checkpoints.room import DiskRoom
from streammerge.heap import temporaries_kept
from streammerge.jobs import Tell, in_forks, in_threads
from streammerge.methods.api import Method, TensorContext, Unit
from streammerge.plan import MergePlan
from streammerge.progress import progress_bar
from streammerge.row_reader import Batch, RowReader, batches
from streammerge.row_writer import Writer
from streammerge.timeline import Timeline
from streammerge.unit_work import Merge, Merged, Survey, Surveyed, UnitWork
from streammerge.workers import single_threaded_torch

_SECONDS = 0.1  # from one word on progress to the next


class Engine:
    """The survey and the merge of one plan, by a few workers with a reader each.

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
        self._surveys: dict[TensorContext, Any] = {}
        self._lock = Lock()

    def run(self) -> tuple[Method, dict[str, dict[str, Any]]]:
        """Merge everything; the method as it was used, and each tensor's report."""
        surveyed = [Unit(tensor.name, (tensor,)) for tensor in self.plan.surveyed if self.prepared is None]
        left = {u.key: [t.name for t in u.tensors if not self.writer.is_complete(t.name)] for u in self.plan.units}
        units = [unit for unit in self.plan.units if left[unit.key]]
        if self.room is not None:
            self.room.expect({unit.key: left[unit.key] for unit in units})
        else:
            self.writer.open(name for unit in units for name in left[unit.key])
        temporaries_kept()
        with single_threaded_torch():
            if surveyed:
                with self.timeline.phase("survey"):
                    self._work("Survey", Survey(self.plan, self.method), surveyed)
            if self.prepared is None:
                in_order = {unit.tensors[0]: self._surveys[unit.tensors[0]] for unit in surveyed}
                records = [record for _, record in self.plan.fishers]
                self.method = self.method.prepared(in_order, records, self.plan.calibrated)
            with self.timeline.phase("merge"):
                self._work(self.label, Merge(self.plan, self.method, self.writer, self.room), units)
                self.writer.wait()
        return self.method, {tensor.name: self.writer.entries[tensor.name] for tensor in self.plan.contexts}

    def _work(self, label: str, work: UnitWork, units: Sequence[Unit]) -> None:
        """Hand the units, in order, to the workers; the first error stops all."""
        loads = [*batches(((unit, work.inputs(unit)) for unit in units), self.plan.budget.buffer_bytes)]
        total, stop = sum(map(work.size, units)), Event()
        with progress_bar(total, label, "B", self.progress) as bar:
            begin = partial(_Worker, work, loads, stop)
            told = partial(self._told, bar)
            if self.plan.by_forks and self.room is None:
                in_forks(self.plan.budget.workers, len(loads), begin, told, self._held)
            else:
                in_threads(self.plan.budget.workers, len(loads), begin, told, stop)

    def _held(self, count: int) -> None:
        self.timeline.forks = count

    def _told(self, bar: tqdm[Any], message: Surveyed | Merged | _Read | _Confirmed) -> None:
        """What a worker tells, from any thread."""
        with self._lock:
            match message:
                case _Read(count):
                    bar.update(count)
                case Surveyed(tensor, result):
                    self._surveys[tensor] = result
                case Merged(name, entry, written):
                    self.writer.complete(name, entry, written)
                case _Confirmed(number, sums):
                    model = self.plan.checkpoints[number]
                    for name, checksum in sums.items():
                        model.confirm(model.info(name), checksum)


@dataclass(frozen=True)
class _Read:
    """So many bytes were read, or turned out not to be needed."""

    count: int


@dataclass(frozen=True)
class _Confirmed:
    """Checksums of what was read, by the tensor's name, in one of the plan's checkpoints."""

    number: int
    sums: dict[str, int]


class _Worker:
    """Does some work on one batch of units after another, through a buffer of its own."""

    def __init__(self, work: UnitWork, loads: Sequence[Batch], stop: Event, tell: Tell) -> None:
        self._work, self._loads, self._stop, self._tell = work, loads, stop, tell
        plan = work.plan
        self._reader = RowReader(plan.budget.buffer_bytes, plan.recipe.allow_nonfinite, self._advance, work.again)
        self._checkpoints = plan.checkpoints
        self._confirmed = [len(model.confirmed()) for model in self._checkpoints]
        self._read, self._told_at = 0, monotonic()

    def __call__(self, number: int) -> None:
        """Work on the batch of this number."""
        self._reader.load(self._loads[number])
        for unit, _ in self._loads[number]:
            if self._stop.is_set():
                return
            self._work.do(self._reader, unit, self._tell, self._stop)
            self._advance(max(self._work.size(unit) - self._reader.bytes_read, 0))  # a pass that was not needed
        self._tell_progress()
        for number, model in enumerate(self._checkpoints):
            if sums := model.confirmed(self._confirmed[number]):
                self._confirmed[number] += len(sums)
                self._tell(_Confirmed(number, sums))

    def _advance(self, count: int) -> None:
        self._read += count
        if monotonic() - self._told_at >= _SECONDS:
            self._tell_progress()

    def _tell_progress(self) -> None:
        self._tell(_Read(self._read))
        self._read, self._told_at = 0, monotonic()
