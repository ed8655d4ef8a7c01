"""Exact selection of the k largest scores of a stream, in constant memory and without a sort.

Non-negative float32 values order like their bit patterns; signs are ignored, and all NaN count as equal and
largest. The k-th largest is looked for in a bracket of patterns, which a sample of the rows makes narrow from the
start: one pass mostly finds it, two do without a sample, three where a sample misled. Scores equal to it are kept in
flat-index order until exactly k are kept; where some of them must go, and there were too many near them to keep track
of, another pass looks for where. Order statistics (the median, quartiles) are found the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.methods.api import Pass, Results, RowBlock, Unit
from streammerge.methods.brackets import KEPT_BYTES, NAN, Bracket, Place, Spread, likely
from streammerge.methods.indicators import above, at_least

if TYPE_CHECKING:
    from torch import Tensor

Scores = Callable[[RowBlock], Sequence["Tensor"]]
Counts = Callable[[Unit, Results], Sequence[int]]
Ranks = Callable[[Unit, Results], Sequence[int | None]]  # from the largest, 1, on; None: not looked for

_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
_INFINITY = 0x7F800000
_SAMPLED_TOGETHER = 1 << 14  # of a block of sampled rows at most so many scores are taken
_MOST_KEPT = 1 << 19  # scores near the thresholds of all experts together, with their places
_NOTHING = 0x7FFFFFFF  # above every score
_EVERYTHING = -1  # below every score


def kept_count(density: float, numel: int) -> int:
    """k = round(density * numel), half to even."""
    return round(density * numel)


@dataclass(frozen=True)
class Selection:
    """Which elements of a unit are kept, for one expert.

    Attributes:
        kept: how many.
        threshold: bit pattern of a score; every score above is kept.
        ties: how many of the scores equal to it are kept too, the first in flat-index order.
        cutoff: flat index from which on a tie is dropped; None until it is known.
    """

    kept: int
    threshold: int
    ties: int = 0
    cutoff: int | None = None

    @property
    def is_final(self) -> bool:
        return self.cutoff is not None

    def mask(self, scores: Tensor, offset: int) -> Tensor:
        """1 where an element is kept, else 0, float32: scores [r, c], the first of them at flat index `offset`."""
        bits = _bits(scores, self.threshold)
        cutoff = self.cutoff or 0
        before = min(max(cutoff - offset, 0), bits.numel())  # elements of this block whose ties are kept
        if before == bits.numel():
            mask = at_least(bits, self.threshold)
        else:
            mask = above(bits, self.threshold)
            if before:
                mask[:before] = at_least(bits[:before], self.threshold)
        return mask.float().view(scores.shape)

    def trimmed(self, vector: Tensor, offset: int) -> Tensor:
        """The entries that are kept and 0 elsewhere, of a vector [r, c] that was selected by its own magnitudes."""
        before = (self.cutoff or 0) - offset
        all_or_none = not 0 < before < vector.numel()  # of the ties in this block
        bound = self.threshold - (before > 0)
        if all_or_none and _is_float32(vector) and bound < _INFINITY:
            return vector.hardshrink(_float(bound) if bound >= 0 else -1.0)  # one step in place of four
        return vector * self.mask(vector, offset)


def top_k_passes(scores: Scores, densities: Sequence[float], name: str = "selection") -> list[Pass]:
    """The passes after which `results[name]` is one final Selection per expert.

    Args:
        scores: row block -> [r, c] per expert, compared as float32 and by magnitude.
        densities: fraction kept per expert; k = round(density * n), n the elements of the unit.
        name: key of the result.
    """
    return k_largest_passes(scores, lambda unit, done: [kept_count(d, unit.numel) for d in densities], name)


def k_largest_passes(scores: Scores, counts: Counts, name: str = "selection") -> list[Pass]:
    """As `top_k_passes`, where the k of each expert follows from the unit and the results of the passes before.

    Args:
        scores: row block -> [r, c] per expert, compared as float32 and by magnitude.
        counts: unit and results -> k per expert.
        name: key of the result.
    """

    def ranks(unit: Unit, done: Results) -> list[int | None]:
        return [count if 0 < count < unit.numel else None for count in counts(unit, done)]

    places = f"{name} places"
    return [*_search(scores, ranks, places), _Thresholds(counts, places, name), _Cutoff(scores, name)]


def order_statistic_passes(
    scores: Callable[[RowBlock], Tensor], ranks: Callable[[int], Sequence[int]], name: str
) -> list[Pass]:
    """The passes after which `results[name]` lists the scores of the given ranks, as floats.

    Args:
        scores: row block -> [r, c], taken as float32 and by magnitude.
        ranks: elements of the unit, n -> places in the ascending order of the scores, 0 to n - 1; always as many.
        name: key of the result.
    """
    places = f"{name} places"

    def from_largest(unit: Unit, done: Results) -> list[int | None]:
        return [unit.numel - rank for rank in ranks(unit.numel)]

    def repeated(block: RowBlock) -> Sequence[Tensor]:
        return [scores(block)] * len(ranks(block.tensor.numel))

    return [*_search(repeated, from_largest, places), _Values(places, name)]


def _search(scores: Scores, ranks: Ranks, name: str) -> list[Pass]:
    """The passes after which `results[name]` is the Place of each rank; nothing where none is looked for."""
    sample, twice = _Sample(scores, ranks, name), [_Narrow(scores, name) for _ in range(2)]
    return [sample, *twice, _Narrow(scores, name, spare=True)]


class _Sample(Pass):
    """Looks at a few rows for where the scores may lie."""

    reads_rows, samples = False, True

    def __init__(self, scores: Scores, ranks: Ranks, name: str) -> None:
        self.scores, self.ranks, self.name = scores, ranks, name

    def start(self, unit: Unit, done: Results) -> Any | None:
        wanted = {i: rank for i, rank in enumerate(self.ranks(unit, done)) if rank is not None}
        return {"numel": unit.numel, "wanted": wanted, "sampled": {i: [] for i in wanted}} if wanted else None

    def update(self, state: Any, block: RowBlock) -> None:
        every = -(-block.base.numel() // _SAMPLED_TOGETHER) | 1  # odd, as what columns repeat is mostly even
        for i, bits in _patterns(self.scores(block), dict.fromkeys(state["wanted"], NAN)):
            state["sampled"][i].append(bits.view(len(block.base), -1)[:, ::every].numpy().copy())

    def finish(self, state: Any) -> dict[int, Bracket | Place]:
        return {i: likely(rank, state["numel"], state["sampled"][i]) for i, rank in state["wanted"].items()}


class _Narrow(Pass):
    """Narrows the brackets that are left."""

    def __init__(self, scores: Scores, name: str, spare: bool = False) -> None:
        self.scores, self.name, self.spare = scores, name, spare

    def workspace(self, unit: Unit) -> int:
        return KEPT_BYTES * min(_MOST_KEPT, unit.numel)

    def start(self, unit: Unit, done: Results) -> Any | None:
        places = done.get(self.name, {})
        left = {i: place for i, place in places.items() if isinstance(place, Bracket)}
        if not left:
            return None
        highest = {i: bracket.high for i, bracket in left.items()}
        spreads = {i: Spread(place, _MOST_KEPT // len(left)) for i, place in left.items()}
        return {"places": places, "highest": highest, "spreads": spreads}

    def update(self, state: Any, block: RowBlock) -> None:
        for i, bits in _patterns(self.scores(block), state["highest"]):
            state["spreads"][i].add(bits, block.offset)

    def finish(self, state: Any) -> dict[int, Bracket | Place]:
        return {**state["places"], **{i: spread.narrowed() for i, spread in state["spreads"].items()}}


class _Thresholds(Pass):
    """Makes selections of the places that were found."""

    reads_rows = False

    def __init__(self, counts: Counts, places: str, name: str) -> None:
        self.counts, self.places, self.name = counts, places, name

    def start(self, unit: Unit, done: Results) -> Any:
        return {"kept": self.counts(unit, done), "numel": unit.numel, "places": done.get(self.places, {})}

    def update(self, state: Any, block: RowBlock) -> None:
        raise AssertionError("reads no rows")

    def finish(self, state: Any) -> list[Selection]:
        selections = []
        for i, kept in enumerate(state["kept"]):
            place = state["places"].get(i)
            if place is None:
                selections.append(Selection(kept, _EVERYTHING if kept else _NOTHING, 0, 0))
            else:
                cutoff = state["numel"] if place.ties == place.equal else place.cutoff
                selections.append(Selection(kept, place.pattern, place.ties, cutoff))
        return selections


class _Cutoff(Pass):
    """Finds the flat index behind the last tie that is kept."""

    def __init__(self, scores: Scores, name: str) -> None:
        self.scores, self.name = scores, name

    def start(self, unit: Unit, done: Results) -> Any | None:
        selections = done[self.name]
        if all(selection.is_final for selection in selections):
            return None
        return {"selections": list(selections), "left": [selection.ties for selection in selections]}

    def update(self, state: Any, block: RowBlock) -> None:
        import numpy as np

        wanted = {i: found.threshold for i, found in enumerate(state["selections"]) if not found.is_final}
        if not wanted:
            return
        for i, bits in _patterns(self.scores(block), wanted):
            ties, left = np.flatnonzero(bits.numpy() == wanted[i]), state["left"][i]
            if len(ties) >= left:
                cutoff = block.offset + int(ties[left - 1]) + 1
                state["selections"][i] = replace(state["selections"][i], cutoff=cutoff)
            state["left"][i] -= len(ties)

    def finish(self, state: Any) -> list[Selection]:
        selections: list[Selection] = state["selections"]
        return selections


class _Values(Pass):
    """Makes floats of the places that were found."""

    reads_rows = False

    def __init__(self, places: str, name: str) -> None:
        self.places, self.name = places, name

    def start(self, unit: Unit, done: Results) -> Any:
        return done[self.places]

    def update(self, state: Any, block: RowBlock) -> None:
        raise AssertionError("reads no rows")

    def finish(self, state: Any) -> list[float]:
        return [_float(state[i].pattern) for i in sorted(state)]


def _patterns(scores: Sequence[Tensor], wanted: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Of the scores that are wanted the number and the patterns, good for comparing with one up to that which is given.

    Scores that are one and the same tensor are looked at once, where they follow each other.
    """
    last: Tensor | None = None
    largest = max(wanted.values())
    for i in wanted:
        if scores[i] is not last:
            last, bits = scores[i], _bits(scores[i], largest)
        yield i, bits


def _bits(scores: Tensor, largest: int = NAN) -> Tensor:
    """The bit patterns of the scores' magnitudes as float32, flat: int32, in the same order as the magnitudes.

    All NaN are the same, `NAN`, if they are compared with as large a pattern; else only larger.
    """
    flat = scores.float().reshape(-1)
    bits = flat.view(_int32()) & _MAGNITUDE
    return bits.clamp_(max=NAN) if largest >= NAN else bits


def _float(pattern: int) -> float:
    """The float32 with these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", pattern))[0]
    return value


def _is_float32(values: Tensor) -> bool:
    import torch

    return values.dtype == torch.float32


def _int32() -> Any:
    import torch

    return torch.int32
