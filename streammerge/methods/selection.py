"""Exact selection of the k largest scores of a stream, in constant memory and without a sort.

Non-negative float32 values order like their bit patterns; signs are ignored, and all NaN count as equal and
largest. A histogram of the high 16 bits finds the bin of the k-th largest, one of the low 16 bits inside that
bin finds its value. Scores equal to it are kept in flat-index order until exactly k are kept; only where some
of them must go does a third pass look for where. Order statistics (the median, quartiles) are found the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.methods.api import Pass, Results, RowBlock, Unit
from streammerge.methods.histograms import HighHalves, LowHalves, descend
from streammerge.methods.indicators import above, at_least, equal

if TYPE_CHECKING:
    from torch import Tensor

Scores = Callable[[RowBlock], Sequence["Tensor"]]
Counts = Callable[[Unit, Results], Sequence[int]]

_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
_NAN = 0x7F800001  # the one pattern that stands for all NaN, just above infinity
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
        bits = _bits(scores)
        cutoff = self.cutoff or 0
        before = min(max(cutoff - offset, 0), bits.numel())  # elements of this block whose ties are kept
        if before == bits.numel():
            mask = at_least(bits, self.threshold)
        else:
            mask = above(bits, self.threshold)
            if before:
                mask[:before] = at_least(bits[:before], self.threshold)
        return mask.float().view(scores.shape)


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
    return [_HighBits(scores, counts, name), _LowBits(scores, name), _Cutoff(scores, name)]


def order_statistic_passes(
    scores: Callable[[RowBlock], Tensor], ranks: Callable[[int], Sequence[int]], name: str
) -> list[Pass]:
    """The passes after which `results[name]` lists the scores of the given ranks, as floats.

    Args:
        scores: row block -> [r, c], taken as float32 and by magnitude.
        ranks: elements of the unit, n -> places in the ascending order of the scores, 0 to n - 1.
        name: key of the result.
    """
    return [_RankBins(scores, ranks, name), _RankValues(scores, name)]


class _HighBits(Pass):
    def __init__(self, scores: Scores, counts: Counts, name: str) -> None:
        self.scores, self.counts, self.name = scores, counts, name

    def start(self, unit: Unit, done: Results) -> Any:
        counts = self.counts(unit, done)
        return {"kept": counts, "numel": unit.numel, "found": [HighHalves() for _ in counts]}

    def update(self, state: Any, block: RowBlock) -> None:
        for i, scores in enumerate(self.scores(block)):
            if 0 < state["kept"][i] < state["numel"]:
                state["found"][i].add(_bits(scores))

    def finish(self, state: Any) -> list[Selection]:
        selections = []
        for kept, found in zip(state["kept"], state["found"], strict=True):
            if kept == 0:
                selections.append(Selection(0, _NOTHING, 0, 0))
            elif kept == state["numel"]:
                selections.append(Selection(kept, _EVERYTHING, 0, 0))
            else:
                high, within = descend(found.counted(), kept)
                selections.append(Selection(kept, high << 16, within))
        return selections


class _LowBits(Pass):
    """Refines a threshold known to its high bits, with `ties` scores to keep inside that bin."""

    def __init__(self, scores: Scores, name: str) -> None:
        self.scores, self.name = scores, name

    def start(self, unit: Unit, done: Results) -> Any | None:
        selections = done[self.name]
        if all(selection.is_final for selection in selections):
            return None
        return {"selections": selections, "numel": unit.numel, "found": [LowHalves() for _ in selections]}

    def update(self, state: Any, block: RowBlock) -> None:
        for i, scores in enumerate(self.scores(block)):
            selection = state["selections"][i]
            if not selection.is_final:
                state["found"][i].add(_bits(scores), selection.threshold >> 16)

    def finish(self, state: Any) -> list[Selection]:
        refined = []
        for selection, found in zip(state["selections"], state["found"], strict=True):
            if not selection.is_final:
                histogram = found.counted()
                low, ties = descend(histogram, selection.ties)
                keeps_all = ties == int(histogram[low])
                selection = replace(
                    selection,
                    threshold=selection.threshold | low,
                    ties=ties,
                    cutoff=state["numel"] if keeps_all else None,
                )
            refined.append(selection)
        return refined


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
        if all(selection.is_final for selection in state["selections"]):
            return
        for i, scores in enumerate(self.scores(block)):
            selection = state["selections"][i]
            if selection.is_final:
                continue
            ties = equal(_bits(scores), selection.threshold)
            count = int(ties.sum())
            if count >= state["left"][i]:
                cutoff = block.offset + int(ties.nonzero()[state["left"][i] - 1]) + 1
                state["selections"][i] = replace(selection, cutoff=cutoff)
            state["left"][i] -= count

    def finish(self, state: Any) -> list[Selection]:
        return state["selections"]  # type: ignore[no-any-return]


class _RankBins(Pass):
    """Finds for every rank the high bits of its score, and its place among the scores that have them, from the top."""

    def __init__(self, scores: Callable[[RowBlock], Tensor], ranks: Callable[[int], Sequence[int]], name: str) -> None:
        self.scores, self.ranks, self.name = scores, ranks, name

    def start(self, unit: Unit, done: Results) -> Any:
        return {"numel": unit.numel, "found": HighHalves()}

    def update(self, state: Any, block: RowBlock) -> None:
        state["found"].add(_bits(self.scores(block)))

    def finish(self, state: Any) -> list[tuple[int, int]]:
        histogram, numel = state["found"].counted(), state["numel"]
        return [descend(histogram, numel - rank) for rank in self.ranks(numel)]


class _RankValues(Pass):
    def __init__(self, scores: Callable[[RowBlock], Tensor], name: str) -> None:
        self.scores, self.name = scores, name

    def start(self, unit: Unit, done: Results) -> Any:
        places = done[self.name]
        bins = sorted({high for high, _ in places})
        return {"places": places, "found": {high: LowHalves() for high in bins}}

    def update(self, state: Any, block: RowBlock) -> None:
        bits = _bits(self.scores(block))
        for high, found in state["found"].items():
            found.add(bits, high)

    def finish(self, state: Any) -> list[float]:
        histograms = {high: found.counted() for high, found in state["found"].items()}
        found = [high << 16 | descend(histograms[high], within)[0] for high, within in state["places"]]
        return [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in found]


def _bits(scores: Tensor) -> Tensor:
    """The bit patterns of the scores' magnitudes as float32, flat: int32, in the same order as the magnitudes."""
    flat = scores.float().reshape(-1)
    return (flat.view(_int32()) & _MAGNITUDE).clamp_(max=_NAN)


def _int32() -> Any:
    import torch

    return torch.int32
