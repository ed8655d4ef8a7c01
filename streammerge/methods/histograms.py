"""Histograms of the high and of the low halves of bit patterns, block by block, and the place of a rank in one.

The patterns are of non-negative float32 values, as int32, so that the high halves are below 32,768.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods.indicators import equal

if TYPE_CHECKING:
    from torch import Tensor

_HIGHS, _ZERO_BINS = 1 << 15, 32
_COUNTED_TOGETHER = 1 << 16  # a histogram of few costs as much as one of this many


class HighHalves:
    """How often each high half occurs.

    Of a fine-tune that left half of the entries alone, half are 0. Counting the same again and again waits every time
    for the count before to be written, so zeros get a few bins behind the others, in turn.
    """

    def __init__(self) -> None:
        self._histogram: Tensor | None = None
        self._turns: Tensor | None = None

    def add(self, bits: Tensor) -> None:
        """Take in the flat bit patterns of a block, which are not needed any more."""
        high = bits.bitwise_right_shift_(16)
        if self._turns is None or len(self._turns) < len(high):
            self._turns = _turns(len(high), high)
        bins = equal(high, 0).mul_(self._turns[: len(high)]).add_(high)
        self._histogram = _added(self._histogram, bins.bincount(minlength=_HIGHS + _ZERO_BINS))

    def counted(self) -> Tensor:
        """32,768 counts."""
        assert self._histogram is not None  # there was at least one block
        counts = self._histogram[:_HIGHS].clone()
        counts[0] += self._histogram[_HIGHS:].sum()
        return counts


def _turns(count: int, like: Tensor) -> Tensor:
    """The bin of a zero at each place."""
    import torch

    turns: Tensor = torch.arange(count, dtype=like.dtype, device=like.device).remainder_(_ZERO_BINS).add_(_HIGHS)
    return turns


class LowHalves:
    """How often each low half occurs among the scores with a given high half; a few blocks are counted together."""

    def __init__(self) -> None:
        self._histogram: Tensor | None = None
        self._waiting: Tensor | None = None  # one piece of memory: many small ones would lie about between the tiles
        self._filled = 0

    def add(self, bits: Tensor, high: int) -> None:
        """Take in the flat bit patterns of a block."""
        if self._waiting is None:
            self._waiting = bits.new_empty(_COUNTED_TOGETHER)
        inside = _with_high_half(bits, high).bitwise_and_(0xFFFF)
        if self._filled + len(inside) > len(self._waiting):
            self._count(self._waiting[: self._filled])
            self._filled = 0
        if len(inside) > len(self._waiting):
            self._count(inside)
        else:
            self._waiting[self._filled : self._filled + len(inside)] = inside
            self._filled += len(inside)

    def counted(self) -> Tensor:
        """65,536 counts."""
        assert self._waiting is not None  # there was at least one block
        self._count(self._waiting[: self._filled])
        self._filled = 0
        assert self._histogram is not None
        return self._histogram

    def _count(self, low: Tensor) -> None:
        self._histogram = _added(self._histogram, low.bincount(minlength=1 << 16))


def _with_high_half(bits: Tensor, high: int) -> Tensor:
    if bits.device.type != "cpu":
        return bits[bits >> 16 == high]
    import torch

    values = bits.numpy()  # numpy picks the few out several times faster
    return torch.from_numpy(values[values >> 16 == high])


def _added(total: Tensor | None, histogram: Tensor) -> Tensor:
    return histogram if total is None else total.add_(histogram)


def descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin of the count-th largest value, and how many values of that bin are among the `count` largest."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < count).sum())
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, count - above
