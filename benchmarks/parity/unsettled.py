"""Positions where two right answers may differ: what is exactly at a threshold is kept by one tool and not the other.

Each function makes one that takes the values of a tensor in the base and the experts, float32, and gives a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Unsettled = Callable[[Sequence[Tensor]], Tensor]

ROUNDING = 1e-5  # relative; scores that take several float32 operations differ by less between the tools


def magnitude_ties(densities: Sequence[float], gamma: float = 0.0) -> Unsettled:
    """Entries as large as the last one kept, or the last outlier dropped, where not all of that size are kept.

    Args:
        densities: fraction kept, per expert.
        gamma: fraction of outliers dropped.
    """

    def unsettled(values: Sequence[Tensor]) -> Tensor:
        base, *experts = values
        found = torch.zeros_like(base, dtype=torch.bool)
        for expert, density in zip(experts, densities, strict=True):
            magnitudes = (expert - base).abs()
            for ours, theirs in boundaries(density, gamma, base.numel()):
                found |= between(magnitudes, ours, theirs)
        return found

    return unsettled


def boundaries(density: float, gamma: float, n: int) -> list[tuple[int, int]]:
    """How many entries are above each threshold, in our tool and in mergekit: the outliers; those and the kept ones."""
    kept, peer_kept = round(density * n), max(int(density * n), 0 if gamma else 1)
    outliers = min(round(gamma * n), n - kept)
    peer_outliers = min(int(gamma * n), n - peer_kept)
    lower = (outliers + kept, peer_outliers + peer_kept)
    return [(outliers, peer_outliers), lower] if gamma else [lower]


def between(scores: Tensor, first: int, second: int, tolerance: float = 0.0) -> Tensor:
    """What one tool may keep and the other drop, where they keep the `first` and the `second` largest scores.

    A score of zero does not count: kept or dropped, it is nothing.

    Args:
        tolerance: relative; scores this close count as equal.
    """
    low, high = sorted((first, second))
    ordered = scores.flatten().sort(descending=True).values.tolist()
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    if low == high:
        if not 0 < low < len(ordered) or ordered[low] < ordered[low - 1] * (1 - tolerance):
            return nothing
        largest, smallest = ordered[low - 1], ordered[low]
    else:
        largest, smallest = ordered[low], ordered[high - 1]
    inside: Tensor = (scores >= smallest * (1 - tolerance)) & (scores <= largest * (1 + tolerance)) & (scores > 0)
    return inside


def variance_ties(select_topk: float) -> Unsettled:
    """Entries whose variance over the experts is, but for rounding, that of the last one kept."""

    def unsettled(values: Sequence[Tensor]) -> Tensor:
        base, *experts = values
        variance = torch.stack([(expert - base).double() for expert in experts]).var(0, unbiased=False)
        k = int(select_topk * int(variance.count_nonzero()))
        return between(variance, k, k, ROUNDING)

    return unsettled


def importance_quartiles(values: Sequence[Tensor]) -> Tensor:
    """Entries whose importance is, but for rounding, at the threshold of arcee_fusion, or between the thresholds of
    quartiles interpolated between neighbours (ours) and rounded down to one (mergekit's)."""
    base, tuned = (value.double() for value in values)
    p, q = (model.softmax(-1) + 1e-8 for model in (tuned, base))
    importance = (tuned - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    thresholds = []
    for how in ("linear", "lower"):
        first, median, third = importance.flatten().quantile(quarters, interpolation=how).tolist()
        thresholds.append(median + 1.5 * (third - first))
    inside: Tensor = (importance >= min(thresholds) * (1 - ROUNDING)) & (importance <= max(thresholds) * (1 + ROUNDING))
    return inside
