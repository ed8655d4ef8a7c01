"""Methods that drop at random: the two tools draw differently, so only what they draw from can be compared."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from parity.bench import Bench, Models
from parity.models import EMBEDDING, make_models

SHAPE = (1024, 512)
LIMIT = 4.0  # standard errors; a fair draw passes it once in 16,000
DENSITIES, WEIGHTS, EPSILON = [0.6, 0.4], [0.9, 0.7], 0.15
CASES = {"dare_linear": 1, "dare_ties": 2, "della_linear": 1, "della": 2}  # experts


@dataclass(frozen=True)
class Row:
    """One line of the table; z: differences of the two tools in standard errors.

    Attributes:
        kept: fraction of entries that are not the base's, of ours and mergekit's.
        kept_z, mean_z, change_z: of that fraction, of the mean entry and of the mean |change|.
        rank_z: the largest of the fraction kept among each quarter of a row by magnitude.
    """

    method: str
    models: str
    kept: tuple[float, float]
    kept_z: float
    mean_z: float
    change_z: float
    rank_z: float

    @property
    def holds(self) -> bool:
        return max(abs(z) for z in (self.kept_z, self.mean_z, self.change_z, self.rank_z)) <= LIMIT

    @property
    def verdict(self) -> str:
        return "alike" if self.holds else "DIFFERS"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def large_models(bench: Bench) -> Models:
    """Near models with an embedding of 524,288 elements, whose task vectors have no zeros."""
    return bench.models(make_models(0.002, experts=2, zeros=0.0, larger={EMBEDDING: SHAPE}))


def compare(bench: Bench, method: str, models: Models) -> Row:
    """Merge with both, mergekit's rescale being `rescale: l1` in ours, and compare the embeddings."""
    experts = len(models.experts)
    densities, weights = DENSITIES[:experts], WEIGHTS[:experts]
    window: dict[str, Any] = {"epsilon": EPSILON} if method.startswith("della") else {}
    ours = bench.ours(method, models, density=densities, coefficient=weights, rescale="l1", **window)
    theirs = bench.theirs(method, models, each={"density": densities, "weight": weights}, seed=1, **window)
    base, first, *_ = (state[EMBEDDING].double() for state in models.states())
    changes = [merged[EMBEDDING].double() - base for merged in (ours.tensors, theirs)]
    return summarise(method, f"large, {experts}", changes[0], changes[1], (first - base).abs())


def summarise(method: str, models: str, ours: Tensor, theirs: Tensor, magnitudes: Tensor) -> Row:
    """The row of two outcomes.

    Args:
        ours, theirs: [r, c], merged minus base.
        magnitudes: [r, c], whose ranks in the row decide in which quarter an entry lies.
    """
    kept = [(change != 0).double() for change in (ours, theirs)]
    quarters = magnitudes.argsort(1).argsort(1) * 4 // magnitudes.shape[1]
    by_rank = [paired_z(*(part[quarters == quarter] for part in kept)) for quarter in range(4)]
    return Row(
        method,
        models,
        kept=(kept[0].mean().item(), kept[1].mean().item()),
        kept_z=paired_z(*kept),
        mean_z=paired_z(ours, theirs),
        change_z=paired_z(ours.abs(), theirs.abs()),
        rank_z=max(by_rank, key=abs),
    )


def paired_z(left: Tensor, right: Tensor) -> float:
    """The mean of left - right in its own standard errors: standard normal where both have the same expectation at
    every position and positions are independent; 0 where they are the same."""
    difference = left - right
    spread = difference.std().item()
    return difference.mean().item() * math.sqrt(difference.numel()) / spread if spread else 0.0
