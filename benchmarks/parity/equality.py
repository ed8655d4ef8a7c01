"""Deterministic methods: both tools on the same models, and mergekit in float64 as what both should give."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from parity.bench import Bench, Models
from parity.cases import Case
from parity.models import State
from parity.ulps import gaps, largest, ulp

TARGET = 2.0  # ulp apart
ROUNDING = 3.0  # ulp from float64: what a sum of a few products may be off in float32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        apart, ours_off, peer_off: largest distance in ulp: of the two, and of each from mergekit in float64.
        absolute: largest difference of the two.
        beyond: positions where the two are further apart than the target.
        excluded: positions where a tie at a trim threshold falls differently by right.
    """

    method: str
    variant: str
    models: str
    apart: float
    absolute: float
    ours_off: float
    peer_off: float
    beyond: int
    excluded: int

    @property
    def verdict(self) -> str:
        if self.apart <= TARGET:
            return "equal"
        if self.ours_off > ROUNDING:
            return "DIFFERS"
        if self.ours_off < self.peer_off:
            return "ours nearer"
        return "rounding" if self.peer_off <= ROUNDING else "DIFFERS"

    @property
    def holds(self) -> bool:
        return self.verdict != "DIFFERS"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare(bench: Bench, case: Case, models: Models, wide: Models) -> Row:
    """Merge with both and measure.

    Args:
        models: float32.
        wide: the same values in float64.
    """
    models, wide = models.first(case.experts), wide.first(case.experts)
    how: dict[str, Any] = {"role": case.role, "each": case.each, **case.theirs}
    ours = bench.ours(case.method, models, **case.ours).tensors
    theirs = bench.theirs(case.method, models, **how)
    exact = bench.theirs(case.method, wide, dtype=None, **how)
    inputs = models.states()
    if not inputs[0].keys() == ours.keys() == theirs.keys():
        raise RuntimeError(f"{case.method}: the outputs have different tensors")

    figures = {"apart": 0.0, "absolute": 0.0, "ours_off": 0.0, "peer_off": 0.0}
    beyond = excluded = 0
    for name, our in ours.items():
        values = [state[name] for state in inputs]
        used = torch.ones_like(our, dtype=torch.bool) if case.unsettled is None else ~case.unsettled(values)
        our, their, right = our[used], theirs[name][used], exact[name][used]
        unit = ulp(torch.stack([*(value[used] for value in values), our, their]).abs().amax(0))
        apart = gaps(our, their, unit)
        found = {
            "apart": largest(apart),
            "absolute": largest(gaps(our, their)),
            "ours_off": largest(gaps(our, right, unit)),
            "peer_off": largest(gaps(their, right, unit)),
        }
        figures = {key: max(value, found[key]) for key, value in figures.items()}
        beyond += int((apart > TARGET).sum())
        excluded += int((~used).sum())
    return Row(case.method, case.variant, f"{case.models}, {case.experts}", beyond=beyond, excluded=excluded, **figures)


def as_float64(state: State) -> State:
    return {name: value.double() for name, value in state.items()}
