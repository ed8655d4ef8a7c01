"""Row blocks of a unit, read into one reused buffer within a budget.

A unit whose inputs fit the buffer is read once and kept for all its passes; a larger one is read again, a
run of whole tiles at a time, for each. What a method sees is the same either way: one tile after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.budget import aligned, run_bytes, unit_bytes
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, require_finite, torch_dtype
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

    def open(self, unit: Unit, inputs: Mapping[str, Inputs]) -> None:
        """Make `unit` the one that `blocks` walks."""
        self._unit, self._inputs = unit, inputs
        self._kept: list[_Run] | None = None
        self._fits = unit_bytes(unit, {t.name: inputs[t.name].infos for t in unit.tensors}) <= len(self._buffer)
        self._checked = self._allow_nonfinite
        self.bytes_read = 0

    def blocks(self) -> Iterator[RowBlock]:
        """The unit's tiles in order. May be called again, once per pass."""
        if self._kept is not None:
            yield from (tile for run in self._kept for tile in run.tiles())
            return
        kept: list[_Run] = []
        position = offset = 0
        for tensor in self._unit.tensors:
            step = tensor.rows if self._fits else self._rows_that_fit(tensor)
            for first in range(0, tensor.rows, max(step, 1)):
                rows = min(step, tensor.rows - first)
                run = self._read(tensor, first, rows, position, offset)
                yield from run.tiles()
                if self._fits:
                    position += run_bytes(tensor, self._inputs[tensor.name].infos, rows)
                    kept.append(run)
            offset += tensor.numel
        self._checked = True
        if self._fits:
            self._kept = kept

    def _rows_that_fit(self, tensor: TensorContext) -> int:
        tile = run_bytes(tensor, self._inputs[tensor.name].infos, tensor.tile_rows)
        return max(1, len(self._buffer) // max(tile, 1)) * tensor.tile_rows

    def _read(self, tensor: TensorContext, first: int, rows: int, position: int, offset: int) -> _Run:
        inputs = self._inputs[tensor.name]
        views = []
        for source in inputs.all:
            row_bytes = source.info.nbytes // tensor.rows
            raw = self._buffer[position : position + rows * row_bytes]
            source.model.read_into(source.info, first * row_bytes, as_bytes(raw))
            view = raw.view(torch_dtype(source.info.dtype)).view(rows, tensor.columns)
            if not self._checked and source.info.floating:
                for tile in view.split(tensor.tile_rows):
                    require_finite(tile, source.info, source.model.id)
            self._advance(len(raw))
            self.bytes_read += len(raw)
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
