"""Block scores -> merge coefficients: pure arithmetic on a few dozen numbers."""

import math
from collections.abc import Sequence
from typing import Literal

Importance = Literal["product", "fim", "norm", "quadratic"]
Theta = float | Literal["adaptive"]


def score(importance: Importance, fisher_mean: float, task_vector_mean_square: float, quadratic_mean: float) -> float:
    """The score s of one decoder block; -inf where the block has no importance at all.

    product     s = log(mean(F) * mean(delta^2))     as published
    fim         s = log(mean(F))
    norm        s = log(mean(delta^2))
    quadratic   s = log(mean(F * delta^2))           the exact diagonal quadratic form
    """
    value = {
        "product": fisher_mean * task_vector_mean_square,
        "fim": fisher_mean,
        "norm": task_vector_mean_square,
        "quadratic": quadratic_mean,
    }[importance]
    if value == 0 and importance == "product" and fisher_mean > 0 and task_vector_mean_square > 0:
        return math.log(fisher_mean) + math.log(task_vector_mean_square)  # the product underflowed
    return math.log(value) if value > 0 else -math.inf


def merge_coefficients(scores: Sequence[float], theta: Theta = "adaptive") -> list[float]:
    """Merge coefficients of the blocks:

        alpha_l = 1 - sigmoid(theta * (s_l - max s)),    theta = 1 / (max s - min s)  if adaptive

    The median that the paper subtracts first cancels. The most important block gets exactly 0.5, with an
    adaptive theta the least important one exactly 1 - sigmoid(-1) = 0.7310586.

    Degenerate scores: blocks at -inf (no Fisher or no task vector) do not count in max and min, and get the
    coefficient of the least important block that does count. Where all scores are equal, or none is finite,
    every coefficient is 0.5.

    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 3.
    """
    finite = [s for s in scores if s > -math.inf]
    if not finite:
        return [0.5] * len(scores)
    top, bottom = max(finite), min(finite)
    distances = [top - max(s, bottom) for s in scores]
    if theta == "adaptive":
        span = top - bottom or 1.0
        return [_logistic(distance / span) for distance in distances]
    return [_logistic(theta * distance) for distance in distances]


def _logistic(x: float) -> float:
    """1 - sigmoid(-x) for x >= 0, which cannot overflow."""
    return 1 / (1 + math.exp(-x))
