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
        self._values = torch.empty(0)
        self._bytes = as_bytes(self._values)
        self._room = self._filled = 0  # elements
        self.nonfinite: Counter[str] = Counter()
        self.written: dict[str, list[Any]] = {}

    def add(self, block: RowBlock, merged: Tensor) -> None:
        """The next tile of the tensor; the first one may be any."""
        count = merged.numel()
        if self._filled + count > self._room:
            self.flush()
        if not self._filled:
            self._tensor, self._start = block.tensor, block.row * block.tensor.columns
            self._make_room(count)
        self._values[self._filled : self._filled + count].view(merged.shape).copy_(merged)
        self._filled += count

    def flush(self) -> None:
        """Write what has been gathered; to be called behind the last tile of a tensor.

        Raises:
            CheckpointError: it holds NaN or Inf, which are not to be let through.
        """
        if self._filled:
            name, width = self._tensor.name, self._values.itemsize
            self._count(self._values[: self._filled])
            written = self._writer.write(name, self._start * width, self._bytes[: self._filled * width])
            self.written.setdefault(name, []).append(written)
            self._filled = 0

    def _make_room(self, count: int) -> None:
        """For at least so many elements of the tensor, in its dtype."""
        dtype = torch_dtype(self._tensor.dtype)
        if count > self._room or dtype != self._values.dtype:
            self._room = max(count, min(PIECE // dtype.itemsize, self._tensor.numel))
            self._values = torch.empty(self._room, dtype=dtype)
            self._bytes = as_bytes(self._values)

    def _count(self, values: Tensor) -> None:
        name, dtype = self._tensor.name, self._tensor.dtype
        if bad := count_nonfinite(values) if values.is_floating_point() else 0:
            if not self._allow_nonfinite:
                raise CheckpointError(
                    f"tensor {name!r}: {bad} of its merged values are too large for {dtype} (NaN or Inf): take smaller "
                    "coefficients, or let them through with --allow-nonfinite"
                )
            self.nonfinite[name] += bad
