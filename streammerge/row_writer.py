"""Merged row blocks, gathered and written a piece at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import count_nonfinite, torch_dtype
from streammerge.errors import CheckpointError
from streammerge.methods.api import RowBlock

PIECE = 1 << 20  # bytes of the output that are written at a time: a share of the processor's cache


class Writer(Protocol):
    """What takes the merged rows: a `CheckpointWriter`, or what compares them with one that is there.

    Once the tensors were opened, `write` works in a fork too; what it returns goes to `complete`, which does not.
    """

    @property
    def entries(self) -> Mapping[str, Any]: ...

    def is_complete(self, name: str) -> bool: ...

    def open(self, names: Iterable[str]) -> None: ...

    def write(self, name: str, start: int, data: memoryview) -> Any: ...

    def complete(self, name: str, entry: Mapping[str, Any], written: Sequence[Any]) -> None: ...

    def wait(self) -> None: ...


class RowWriter:
    """Gathers merged tiles in the output's dtype, and writes a piece of a tensor at a time.

    Args:
        writer: takes the pieces.
        allow_nonfinite: let NaN and Inf through.

    Attributes:
        nonfinite: tensor name -> how many NaN and Inf were written.
        written: tensor name -> what the writer returned for each piece.
    """

    def __init__(self, writer: Writer, allow_nonfinite: bool) -> None:
        self._writer, self._allow_nonfinite = writer, allow_nonfinite
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._filled = 0
        self.nonfinite: Counter[str] = Counter()
        self.written: dict[str, list[Any]] = {}

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
            self._tensor, self._start = block.tensor, block.row * block.tensor.columns * dtype.itemsize
        self._memory[self._filled : self._filled + count].view(dtype).view(merged.shape).copy_(merged)
        self._filled += count

    def flush(self) -> None:
        """Write what has been gathered; to be called behind the last tile of a tensor.

        Raises:
            CheckpointError: it holds NaN or Inf, which are not to be let through.
        """
        if self._filled:
            piece = self._memory[: self._filled]
            self._count(piece.view(torch_dtype(self._tensor.dtype)))
            written = self._writer.write(self._tensor.name, self._start, as_bytes(piece))
            self.written.setdefault(self._tensor.name, []).append(written)
            self._filled = 0

    def _count(self, values: Tensor) -> None:
        name, dtype = self._tensor.name, self._tensor.dtype
        if bad := count_nonfinite(values) if values.is_floating_point() else 0:
            if not self._allow_nonfinite:
                raise CheckpointError(
                    f"tensor {name!r}: {bad} of its merged values are too large for {dtype} (NaN or Inf): take smaller "
                    "coefficients, or let them through with --allow-nonfinite"
                )
            self.nonfinite[name] += bad
