"""The bit pattern of the k-th largest score, narrowed down pass by pass.

The patterns are of non-negative float32 values, as int32, which order as the values do. A pass counts the scores above
a bracket of patterns, and keeps those in it with their places: then all is known. Where they are too many, it counts
them in 65,536 bins, and one bin is left. Where bins hold more than one pattern, those that are not the first of their
bin are noted besides, as far as there is room. Of differences of bfloat16 numbers, whose patterns mostly end in zeros,
these are so few that one pass is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NAN = 0x7F800001  # the one pattern that stands for all NaN, just above infinity

KEPT_BYTES = 12  # of a score that is kept with its place

_BINS_LOG2 = 16
_COUNTED_TOGETHER = 1 << 16  # a histogram of few costs as much as one of this many
_MOST_NOTED = 1 << 16
_DEVIATIONS = 4  # of the sampling error, on either side; beyond that a pass more is needed
_LEAST_MARGIN = 0.002  # of all scores


@dataclass(frozen=True)
class Bracket:
    """Patterns among which that of the k-th largest score is looked for; zeros are what is left below.

    Attributes:
        k: its rank, from 1 on.
        low, high: the least and the largest pattern.
    """

    k: int
    low: int = 1
    high: int = NAN


@dataclass(frozen=True)
class Place:
    """Where the k-th largest score was found.

    Attributes:
        pattern: its bit pattern.
        ties: how many scores with this pattern are among the k largest.
        equal: how many there are in all.
        cutoff: flat index behind the last of the ties; None where it was not seen.
    """

    pattern: int
    ties: int
    equal: int
    cutoff: int | None = None


class Spread:
    """How scores lie in a bracket, and how many are above it.

    Args:
        room: for how many of those in the bracket, KEPT_BYTES each.
    """

    def __init__(self, bracket: Bracket, room: int) -> None:
        self._bracket = bracket
        self._shift = max((bracket.high - bracket.low).bit_length() - _BINS_LOG2, 0)
        self._origin = bracket.low >> self._shift << self._shift
        self._seen = self._above = 0
        self._kept = _Gathered(room)  # distances from the bracket's low end
        self._indices = _Gathered(room, "int64")
        self._kept_all = True
        self._bins = _Gathered(_COUNTED_TOGETHER)
        self._noted = _Gathered(_MOST_NOTED)  # distances from the origin
        self._noted_all = True
        self._histogram: np.ndarray | None = None

    def add(self, patterns: Tensor, offset: int) -> None:
        """Take in the flat patterns of a block, the first of them at flat index `offset`; blocks come in order."""
        import numpy as np

        values, low = patterns.numpy(), self._bracket.low  # numpy picks the few out several times faster
        is_above = values > self._bracket.high
        self._seen += len(values)
        self._above += int(np.count_nonzero(is_above))
        is_inside = (values >= low) ^ is_above
        if self._kept_all:
            indices = np.flatnonzero(is_inside)
            inside = values[indices] - np.int32(low)
            indices += offset
            if self._kept.add(inside) and self._indices.add(indices):
                return
            self._kept_all = False
            self._bin(self._kept.take())
            self._kept = self._indices = _Gathered(0)
        else:
            inside = values[is_inside] - np.int32(low)
        self._bin(inside)

    def _bin(self, inside: np.ndarray) -> None:
        """Count, from now on, in bins; the distances are changed."""
        if self._shift:
            inside += self._bracket.low - self._origin
            self._note(inside)
            inside >>= self._shift
        if not self._bins.add(inside):
            self._count(self._bins.take())
            if not self._bins.add(inside):
                self._count(inside)

    def _note(self, inside: np.ndarray) -> None:
        if self._noted_all:
            later = inside[inside & (1 << self._shift) - 1 != 0]
            self._noted_all = self._noted.add(later)

    def _count(self, bins: np.ndarray) -> None:
        import numpy as np

        found = np.bincount(bins, minlength=(self._bracket.high - self._origin >> self._shift) + 1)
        if self._histogram is None:
            self._histogram = found
        else:
            self._histogram += found

    def _counted(self) -> np.ndarray:
        """How many there are in each bin."""
        self._count(self._bins.take())
        assert self._histogram is not None
        return self._histogram

    def narrowed(self) -> Bracket | Place:
        """Where the k-th largest is, or a narrower bracket for it; another one where it was not in this."""
        k, low, high = self._bracket.k, self._bracket.low, self._bracket.high
        inside = self._kept.filled if self._kept_all else int(self._counted().sum())
        if k <= self._above:
            return Bracket(k, high + 1, NAN)
        if k > self._above + inside:
            below = self._seen - self._above - inside
            return Bracket(k, 1, low - 1) if low > 1 else Place(0, k - self._above - inside, below)
        return self._among_kept(k - self._above) if self._kept_all else self._among_bins(k)

    def _among_kept(self, k: int) -> Place:
        """The place of the k-th largest of those that were kept."""
        import numpy as np

        kept, indices = self._kept.take(), self._indices.take()
        pattern = np.sort(kept)[len(kept) - k]  # partitioning is slower by far where most are equal to others
        equal = indices[np.flatnonzero(kept == pattern)]
        ties = k - int(np.count_nonzero(kept > pattern))
        return Place(self._bracket.low + int(pattern), ties, len(equal), int(equal[ties - 1]) + 1)

    def _among_bins(self, k: int) -> Bracket | Place:
        """The place of the k-th largest of all, if it was noted; else the bin it lies in."""
        import numpy as np

        low, high, histogram = self._bracket.low, self._bracket.high, self._counted()
        from_top = self._above + np.cumsum(histogram[::-1])
        position = int(np.searchsorted(from_top, k))
        number, count = len(from_top) - 1 - position, int(histogram[::-1][position])
        first, left = self._origin + (number << self._shift), k - (int(from_top[position]) - count)
        if not self._noted_all:
            return Bracket(k, max(first, low), min(first + (1 << self._shift) - 1, high))
        noted = self._noted.take()
        later = np.sort(noted[noted >> self._shift == number])[::-1]
        if left > len(later):
            return Place(first, left - len(later), count - len(later))
        pattern = later[left - 1]
        larger, equal = int((later > pattern).sum()), int((later == pattern).sum())
        return Place(self._origin + int(pattern), left - larger, equal)


class _Gathered:
    """Numbers in one piece of memory: many small pieces would lie about between the tiles.

    Attributes:
        filled: how many are there.
    """

    def __init__(self, most: int, dtype: str = "int32") -> None:
        self._most, self._dtype, self.filled = most, dtype, 0
        self._values: np.ndarray | None = None

    def add(self, values: np.ndarray) -> bool:
        """Whether there was room for them."""
        import numpy as np

        if self.filled + len(values) > self._most:
            return False
        if self._values is None:
            self._values = np.empty(self._most, dtype=self._dtype)
        self._values[self.filled : self.filled + len(values)] = values
        self.filled += len(values)
        return True

    def take(self) -> np.ndarray:
        """Those that are there, until the next are added; then there are none."""
        import numpy as np

        filled, self.filled = self.filled, 0
        return np.empty(0, dtype=self._dtype) if self._values is None else self._values[:filled]


def likely(k: int, numel: int, sampled: Sequence[np.ndarray]) -> Bracket:
    """Where the k-th largest of so many scores probably lies, from some of them.

    As far on either side as the sampling error calls for, which is estimated from how the rows differ.

    Args:
        sampled: patterns [rows, some of the columns]; none: anywhere.
    """
    import numpy as np

    if not sampled:
        return Bracket(k)
    scores = np.sort(np.concatenate([rows.reshape(-1) for rows in sampled]))[::-1]
    count, share = len(scores), k / numel
    middle = scores[min(int(share * count), count - 1)]
    shares = np.concatenate([(rows >= middle).mean(1) for rows in sampled])
    margin = _DEVIATIONS * float(shares.std()) / math.sqrt(len(shares)) + _LEAST_MARGIN
    first, last = int((share - margin) * count), math.ceil((share + margin) * count)
    low = int(scores[last]) if last < count else 1
    high = int(scores[first]) if first > 0 else NAN
    return Bracket(k, max(low, 1), max(high, 1))
