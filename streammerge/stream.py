"""Row blocks of a unit, read into one reused buffer within a budget, and written a piece at a time.

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
from streammerge.checkpoints.checkpoint import Checkpoint, require_finite, torch_dtype
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.writer import CheckpointWriter
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
PIECE = 1 << 20  # bytes of an input read at a time from a local disk, and of the output written: a share of the cache


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
    """

    def __init__(self, buffer_bytes: int, allow_nonfinite: bool, advance: Callable[[int], object]) -> None:
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
        self._allow_nonfinite, self._advance = allow_nonfinite, advance

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
        self._streamed = any(model.is_streamed(info) for model, of in parts.items() for info, _, _ in of)
        if position > len(self._buffer):
            return
        self._places = places
        if self._streamed:
            for model, of_model in parts.items():
                model.read_many(of_model)
                self._advance(sum(info.nbytes for info, _, _ in of_model))

    def open(self, unit: Unit, once: bool = False) -> Mapping[str, Inputs]:
        """Make a unit of the batch the one that `blocks` walks, `once` or more often."""
        self._unit, self._inputs = unit, self._batch[unit.key]
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
            for first in range(0, tensor.rows, max(step, 1)):
                rows = min(step, tensor.rows - first)
                starts = list(_starts(tensor, infos, position, first, rows))
                if not self._loaded:
                    self._read(tensor, first, rows, starts)
                run = self._run(tensor, first, rows, starts, offset)
                yield from run.tiles()
                if position is not None:
                    kept.append(run)
            if position is not None:
                position += run_bytes(tensor, infos, tensor.rows)
            offset += tensor.numel
        self._checked = True
        if position is not None:
            self._kept = kept

    def _rows_at_once(self, tensor: TensorContext) -> int:
        infos = self._inputs[tensor.name].infos
        room = len(self._buffer) if self._streamed else min(len(self._buffer), PIECE * len(infos))
        return max(1, room // max(run_bytes(tensor, infos, tensor.tile_rows), 1)) * tensor.tile_rows

    def _read(self, tensor: TensorContext, first: int, rows: int, starts: Sequence[int]) -> None:
        """Some rows of every input, to where they start in the buffer."""
        for source, start in zip(self._inputs[tensor.name].all, starts, strict=True):
            row_bytes = source.info.nbytes // tensor.rows
            raw = self._buffer[start : start + rows * row_bytes]
            source.model.read_into(source.info, first * row_bytes, as_bytes(raw))
            self._advance(len(raw))
            self.bytes_read += len(raw)

    def _run(self, tensor: TensorContext, first: int, rows: int, starts: Sequence[int], offset: int) -> _Run:
        """Rows that lie in the buffer; looked through for NaN and Inf the first time."""
        inputs = self._inputs[tensor.name]
        views = []
        for source, start in zip(inputs.all, starts, strict=True):
            raw = self._buffer[start : start + rows * (source.info.nbytes // tensor.rows)]
            view = raw.view(torch_dtype(source.info.dtype)).view(rows, tensor.columns)
            if not self._checked and source.info.floating:
                for tile in view.split(tensor.tile_rows):
                    require_finite(tile, source.info, source.model.id)
            views.append(view)
        models = len(views) - len(inputs.fishers)
        compute = torch.float64 if any(source.info.dtype == "F64" for source in inputs.all) else torch.float32
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


class RowWriter:
    """Gathers merged tiles in the output's dtype, and writes a piece of a tensor at a time."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._name, self._start, self._filled = "", 0, 0

    def add(self, block: RowBlock, merged: Tensor) -> None:
        """The next tile of the tensor; the first one may be any."""
        dtype = torch_dtype(block.tensor.dtype)
        count = merged.numel() * dtype.itemsize
        if self._filled + count > len(self._memory):
            self.flush()
            if count > len(self._memory):
                whole = block.tensor.numel * dtype.itemsize
                self._memory = torch.empty(max(count, min(PIECE, whole)), dtype=torch.uint8)
        if not self._filled:
            self._name, self._start = block.tensor.name, block.row * block.tensor.columns * dtype.itemsize
        self._memory[self._filled : self._filled + count].view(dtype).view(merged.shape).copy_(merged)
        self._filled += count

    def flush(self) -> None:
        """Write what has been gathered; to be called behind the last tile of a tensor."""
        if self._filled:
            self._writer.write(self._name, self._start, as_bytes(self._memory[: self._filled]))
            self._filled = 0


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
