"""Row blocks of a unit, read into one reused buffer within a budget.

A unit whose inputs fit the buffer is read once and kept for all its passes. A larger one is read again, a run of whole
tiles at a time, for each. What a method sees is the same either way: one tile after another. From a local disk runs are
short, so that they are still in the processor's cache when they are used. A model on the Hub is not asked for a few
bytes at a time: what fits is fetched whole, together with small units beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.budget import aligned, run_bytes, unit_bytes
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, count_nonfinite, require_finite, torch_dtype
from streammerge.checkpoints.checksum import add, part_sum
from streammerge.checkpoints.header import TensorInfo
from streammerge.methods.api import RowBlock, TensorContext, Unit


@dataclass(frozen=True)
class Input:
    """One tensor in one checkpoint."""

    model: Checkpoint
    info: TensorInfo


@dataclass(frozen=True)
class Inputs:
    """The same tensor in every checkpoint that is read for it."""

    base: Input
    experts: tuple[Input, ...] = ()
    fishers: tuple[Input, ...] = ()

    @property
    def all(self) -> tuple[Input, ...]:
        return (self.base, *self.experts, *self.fishers)

    @property
    def infos(self) -> list[TensorInfo]:
        return [source.info for source in self.all]


Batch = Sequence[tuple[Unit, Mapping[str, Inputs]]]

SMALL = 1 << 20  # bytes; units smaller than this, together, are read with the one before them
PIECE = 1 << 20  # bytes of an input read at a time from a local disk: a share of the cache

FEWEST_SAMPLED, MOST_SAMPLED = 48, 2048  # rows of a unit
SAMPLED_OF = 16  # of so many rows at most one is sampled


def batches(units: Iterable[tuple[Unit, Mapping[str, Inputs]]], buffer_bytes: int) -> Iterator[Batch]:
    """Consecutive units that are read together: one, and small ones around it, as far as they fit the buffer."""
    batch: list[tuple[Unit, Mapping[str, Inputs]]] = []
    filled = small = 0
    for unit, inputs in units:
        size = unit_bytes(unit, {tensor.name: inputs[tensor.name].infos for tensor in unit.tensors})
        joins = small + size <= SMALL or (small <= SMALL and small == filled)
        if batch and not (joins and filled + size <= buffer_bytes):
            yield batch
            batch, filled, small = [], 0, 0
        batch.append((unit, inputs))
        filled += size
        small += size if small + size <= SMALL else 0
    if batch:
        yield batch


class RowReader:
    """Reads units through one buffer; every worker has its own.

    Args:
        buffer_bytes: size of the buffer.
        allow_nonfinite: do not look for NaN and Inf.
        advance: called with the number of bytes after each read.
        again: all that is read will be read again.

    What is read more than once, by any reader, must be the same every time: its checksum is compared, and
    CheckpointError raised where it differs.
    """

    def __init__(
        self, buffer_bytes: int, allow_nonfinite: bool, advance: Callable[[int], object], again: bool = False
    ) -> None:
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
        self._bytes = as_bytes(self._buffer)
        self._allow_nonfinite, self._advance, self._again = allow_nonfinite, advance, again

    def load(self, batch: Batch) -> None:
        """Make these the units that can be opened, and read them if they fit the buffer; a larger one comes alone."""
        self._batch = {unit.key: inputs for unit, inputs in batch}
        self._places: dict[str, int] = {}
        position = 0
        parts: dict[Checkpoint, list[tuple[TensorInfo, int, memoryview]]] = {}
        places: dict[str, int] = {}
        for unit, inputs in batch:
            places[unit.key] = position
            for source in (source for tensor in unit.tensors for source in inputs[tensor.name].all):
                raw = self._bytes[position : position + source.info.nbytes]
                parts.setdefault(source.model, []).append((source.info, 0, raw))
                position += aligned(source.info.nbytes)
        self._streamed = any(model.is_streamed(info) for model, of in parts.items() for info, _, _ in of)
        if position > len(self._bytes):
            return
        self._places = places
        if self._streamed:
            for model, of_model in parts.items():
                model.read_many(of_model)
                for info, _, data in of_model:
                    if self._again or model.is_known(info):
                        model.confirm(info, part_sum(data))
                self._advance(sum(info.nbytes for info, _, _ in of_model))

    def open(self, unit: Unit, once: bool = False) -> Mapping[str, Inputs]:
        """Make a unit of the batch the one that `blocks` walks, `once` or more often."""
        self._unit, self._inputs = unit, self._batch[unit.key]
        self._once = once
        self._kept: list[_Run] | None = None
        self._checked = self._allow_nonfinite
        self._position = self._places.get(unit.key)
        self._loaded = self._streamed and self._position is not None
        if once and not self._loaded:
            self._position = None  # read through the same small piece of the buffer
        self.bytes_read = sum(info.nbytes for i in self._inputs.values() for info in i.infos) if self._loaded else 0
        return self._inputs

    def blocks(self) -> Iterator[RowBlock]:
        """The unit's tiles in order. May be called again, once per pass."""
        if self._kept is not None:
            yield from (tile for run in self._kept for tile in run.tiles())
            return
        position, offset = self._position, 0
        kept: list[_Run] = []
        for tensor in self._unit.tensors:
            infos = self._inputs[tensor.name].infos
            step = tensor.rows if self._loaded else self._rows_at_once(tensor)
            sums = [0 if self._is_compared(source) else None for source in self._inputs[tensor.name].all]
            for first in range(0, tensor.rows, max(step, 1)):
                rows = min(step, tensor.rows - first)
                starts = list(_starts(tensor, infos, position, first, rows))
                if not self._loaded:
                    self._read(tensor, first, rows, starts, sums)
                run = self._run(tensor, first, rows, starts, offset)
                yield from run.tiles()
                if position is not None:
                    kept.append(run)
            if position is not None:
                position += run_bytes(tensor, infos, tensor.rows)
            offset += tensor.numel
            for source, checksum in zip(self._inputs[tensor.name].all, sums, strict=True):
                if checksum is not None:
                    source.model.confirm(source.info, checksum)
        self._checked = True
        if position is not None:
            self._kept = kept

    def sample(self) -> Iterator[RowBlock]:
        """Some of the unit's rows, evenly spread, a tile's worth at a time; none of a small unit, or of one far away.

        They are not looked through for NaN, neither counted as read nor compared with what is read again.
        """
        unit, at_hand = self._unit, self._loaded or self._kept is not None
        total = sum(tensor.rows for tensor in unit.tensors)
        wanted = min(max(unit.numel >> 16, FEWEST_SAMPLED), MOST_SAMPLED, total // SAMPLED_OF)
        if wanted < FEWEST_SAMPLED or (self._streamed and not at_hand):
            return
        every = total // wanted
        position, offset = self._position or 0, 0
        for tensor in unit.tensors:
            chosen = range(every // 2, tensor.rows, every)
            for first in range(0, len(chosen), tensor.tile_rows):
                rows = chosen[first : first + tensor.tile_rows]
                views = self._rows_at_hand(tensor, position, rows) if at_hand else self._rows_fetched(tensor, rows)
                yield from self._as_run(tensor, views, rows[0], offset).tiles()
            position += run_bytes(tensor, self._inputs[tensor.name].infos, tensor.rows)
            offset += tensor.numel

    def _rows_at_hand(self, tensor: TensorContext, position: int, rows: range) -> list[Tensor]:
        infos = self._inputs[tensor.name].infos
        starts = _starts(tensor, infos, position, 0, tensor.rows)
        views = (self._view(tensor, info, start, tensor.rows) for info, start in zip(infos, starts, strict=True))
        return [view[rows.start : rows.stop : rows.step] for view in views]

    def _rows_fetched(self, tensor: TensorContext, rows: range) -> list[Tensor]:
        """To the head of the buffer, where nothing lies before the unit's first pass."""
        inputs = self._inputs[tensor.name]
        views = []
        for source, start in zip(inputs.all, _starts(tensor, inputs.infos, None, 0, len(rows)), strict=True):
            size, data = source.info.nbytes // tensor.rows, self._bytes[start:]
            parts = [(source.info, row * size, data[i * size : (i + 1) * size]) for i, row in enumerate(rows)]
            source.model.read_many(parts)
            views.append(self._view(tensor, source.info, start, len(rows)))
        return views

    def _rows_at_once(self, tensor: TensorContext) -> int:
        infos = self._inputs[tensor.name].infos
        room = len(self._bytes) if self._streamed else min(len(self._bytes), PIECE * len(infos))
        return max(1, room // max(run_bytes(tensor, infos, tensor.tile_rows), 1)) * tensor.tile_rows

    def _read(
        self, tensor: TensorContext, first: int, rows: int, starts: Sequence[int], sums: list[int | None]
    ) -> None:
        """Some rows of every input, to where they start in the buffer; added to the checksums that are asked for."""
        for number, source in enumerate(self._inputs[tensor.name].all):
            row_bytes = source.info.nbytes // tensor.rows
            raw = self._bytes[starts[number] : starts[number] + rows * row_bytes]
            source.model.read_into(source.info, first * row_bytes, raw)
            self._advance(len(raw))
            self.bytes_read += len(raw)
            if (known := sums[number]) is not None:
                sums[number] = add(known, part_sum(raw, first * row_bytes))

    def _is_compared(self, source: Input) -> bool:
        """Whether what `blocks` reads now was read before, or will be again."""
        again = self._again or (self._position is None and not self._once)
        return not self._loaded and (again or source.model.is_known(source.info))

    def _run(self, tensor: TensorContext, first: int, rows: int, starts: Sequence[int], offset: int) -> _Run:
        """Rows that lie in the buffer; looked through for NaN and Inf the first time."""
        views = []
        for source, start in zip(self._inputs[tensor.name].all, starts, strict=True):
            view = self._view(tensor, source.info, start, rows)
            if not self._checked and source.info.floating and count_nonfinite(view):
                for tile in view.split(tensor.tile_rows):  # so that the first error is the same however much is read
                    require_finite(tile, source.info, source.model.id)
            views.append(view)
        return self._as_run(tensor, views, first, offset)

    def _view(self, tensor: TensorContext, info: TensorInfo, start: int, rows: int) -> Tensor:
        """Some rows of an input, which begin at `start` of the buffer."""
        raw = self._buffer[start : start + rows * (info.nbytes // tensor.rows)]
        return raw.view(torch_dtype(info.dtype)).view(rows, tensor.columns)

    def _as_run(self, tensor: TensorContext, views: Sequence[Tensor], first: int, offset: int) -> _Run:
        inputs = self._inputs[tensor.name]
        models = len(views) - len(inputs.fishers)
        compute = torch.float64 if any(info.dtype == "F64" for info in inputs.infos) else torch.float32
        return _Run(tensor, offset, first, views[:models], views[models:], compute)


def _starts(
    tensor: TensorContext, infos: Sequence[TensorInfo], position: int | None, first: int, rows: int
) -> Iterator[int]:
    """Where in the buffer some rows of every input begin: one after another, or in the whole kept at `position`."""
    start = position or 0
    for info in infos:
        row_bytes = info.nbytes // tensor.rows
        yield start if position is None else start + first * row_bytes
        start += aligned(rows * row_bytes if position is None else info.nbytes)


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of one tensor, in the buffer."""

    tensor: TensorContext
    offset: int
    first: int
    stored: Sequence[Tensor]
    fishers: Sequence[Tensor]
    compute: torch.dtype

    def tiles(self) -> Iterator[RowBlock]:
        step = self.tensor.tile_rows
        for row in range(0, self.stored[0].shape[0], step):
            rows = slice(row, row + step)
            yield RowBlock(
                self.tensor,
                self.offset,
                self.first + row,
                [values[rows] for values in self.stored],
                [values[rows] for values in self.fishers],
                self.compute,
            )
