"""Row blocks of a unit, read into one reused buffer within a budget.

A unit whose inputs fit the buffer is read once and kept for all its passes, together with small ones beside it, so
that a model on the Hub is not asked for a few bytes at a time. A larger one is read again, a run of whole tiles at a
time, for each. What a method sees is the same either way: one tile after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.budget import aligned, run_bytes, unit_bytes
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, require_finite, torch_dtype
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
                raw = self._buffer[position : position + source.info.nbytes]
                parts.setdefault(source.model, []).append((source.info, 0, as_bytes(raw)))
                position += aligned(source.info.nbytes)
        if position > len(self._buffer):
            return
        self._places = places
        for model, of_model in parts.items():
            model.read_many(of_model)
            for info, _, data in of_model:
                if self._again or model.is_known(info):
                    model.confirm(info, part_sum(data))
            self._advance(sum(info.nbytes for info, _, _ in of_model))

    def open(self, unit: Unit, once: bool = False) -> Mapping[str, Inputs]:
        """Make a unit of the batch the one that `blocks` walks, `once` or more often."""
        self._unit, self._inputs = unit, self._batch[unit.key]
        self._once = once and not self._again
        self._kept: list[_Run] | None = None
        self._checked = self._allow_nonfinite
        loaded = unit.key in self._places
        self.bytes_read = sum(info.nbytes for i in self._inputs.values() for info in i.infos) if loaded else 0
        return self._inputs

    def blocks(self) -> Iterator[RowBlock]:
        """The unit's tiles in order. May be called again, once per pass."""
        if self._kept is not None:
            yield from (tile for run in self._kept for tile in run.tiles())
            return
        position = self._places.get(self._unit.key)
        kept: list[_Run] = []
        offset = 0
        for tensor in self._unit.tensors:
            step = self._rows_that_fit(tensor) if position is None else tensor.rows
            sums = [0 if self._is_compared(source) else None for source in self._inputs[tensor.name].all]
            for first in range(0, tensor.rows, max(step, 1)):
                rows = min(step, tensor.rows - first)
                if position is None:
                    self._read(tensor, first, rows, sums)
                run = self._run(tensor, first, rows, position or 0, offset)
                yield from run.tiles()
                if position is not None:
                    position += run_bytes(tensor, self._inputs[tensor.name].infos, rows)
                    kept.append(run)
            offset += tensor.numel
            for source, checksum in zip(self._inputs[tensor.name].all, sums, strict=True):
                if position is None and checksum is not None:
                    source.model.confirm(source.info, checksum)
        self._checked = True
        if position is not None:
            self._kept = kept

    def _rows_that_fit(self, tensor: TensorContext) -> int:
        tile = run_bytes(tensor, self._inputs[tensor.name].infos, tensor.tile_rows)
        return max(1, len(self._buffer) // max(tile, 1)) * tensor.tile_rows

    def _read(self, tensor: TensorContext, first: int, rows: int, sums: list[int | None]) -> None:
        """Some rows of every input, from the start of the buffer on; added to the checksums that are asked for."""
        position = 0
        for number, (source, checksum) in enumerate(zip(self._inputs[tensor.name].all, sums, strict=True)):
            row_bytes = source.info.nbytes // tensor.rows
            raw = self._buffer[position : position + rows * row_bytes]
            source.model.read_into(source.info, first * row_bytes, as_bytes(raw))
            self._advance(len(raw))
            self.bytes_read += len(raw)
            position += aligned(len(raw))
            if checksum is not None:
                sums[number] = add(checksum, part_sum(as_bytes(raw), first * row_bytes))

    def _is_compared(self, source: Input) -> bool:
        return not self._once or source.model.is_known(source.info)

    def _run(self, tensor: TensorContext, first: int, rows: int, position: int, offset: int) -> _Run:
        """Rows that lie in the buffer from `position` on; looked through for NaN and Inf the first time."""
        inputs = self._inputs[tensor.name]
        views = []
        for source in inputs.all:
            raw = self._buffer[position : position + rows * (source.info.nbytes // tensor.rows)]
            view = raw.view(torch_dtype(source.info.dtype)).view(rows, tensor.columns)
            if not self._checked and source.info.floating:
                for tile in view.split(tensor.tile_rows):
                    require_finite(tile, source.info, source.model.id)
            views.append(view)
            position += aligned(len(raw))
        models = len(views) - len(inputs.fishers)
        compute = torch.float64 if any(source.info.dtype == "F64" for source in inputs.all) else torch.float32
        return _Run(tensor, offset, first, views[:models], views[models:], compute)


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
        for row in range(0, len(self.stored[0]), self.tensor.tile_rows):
            rows = slice(row, row + self.tensor.tile_rows)
            yield RowBlock(
                self.tensor,
                self.offset,
                self.first + row,
                [values[rows] for values in self.stored],
                [values[rows] for values in self.fishers],
                self.compute,
            )
