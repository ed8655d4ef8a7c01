"""The numbers of a diagnosis that are made from activations, or from other numbers. All in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.diagnose.settings import RankOf

if TYPE_CHECKING:
    from torch import Tensor


Distances = tuple[float | None, float | None, float | None]


def activation_variance(hidden: Tensor) -> float:
    """Population variance (over n, not n - 1) of each feature over all tokens, mean over the features.

    hidden: [tokens, features], float64; the tokens of all sequences one after another.

    Reference: the Fisher-Rao paper, arXiv 2603.04972, section 4.2.
    """
    return float(hidden.var(0, correction=0).mean())


def effective_rank(hidden: Tensor, of: RankOf = "eigenvalues") -> float:
    """In how many directions activations vary: exp(-sum_j p_j ln p_j), p_j = v_j / sum_j v_j.

    v are the eigenvalues of the covariance of hidden [tokens, features], float64, or its singular values once each
    feature's mean is taken away, the square roots of those. Both come from the smaller one of the tokens x tokens and
    features x features products. Activations that are the same for all tokens have rank 0.

    Convention: centred, where Roy and Vetterli take a matrix as it is: the mean alone would be one more direction, and
        mostly the largest one. Eigenvalues below float64's rounding of the largest count as zero.
    Reference: Roy and Vetterli, The effective rank, EUSIPCO 2007 (`singular`); arXiv 2603.04972, section 4.2, has
        eigenvalues of the covariance.
    """
    import torch

    centred = hidden - hidden[:1]  # so that equal rows become zeros and not rounding
    centred -= centred.mean(0)
    tokens, features = centred.shape
    values = torch.linalg.eigvalsh(centred @ centred.T if tokens <= features else centred.T @ centred)
    values[values <= torch.finfo(values.dtype).eps * len(values) * values[-1]] = 0
    values = values.clamp(min=0)
    if of == "singular":
        values = values.sqrt()
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def distances_from_linear(start: Tensor, end: Tensor, between: Tensor, alpha: float) -> Distances:
    """How far a function's value at theta0 + alpha d is from the straight line between its values at both ends.

    f(theta0), f(theta0 + d) and f(theta0 + alpha d), of one shape; |.| the Euclidean norm of all elements, float64:

        line                  = f(theta0) + alpha (f(theta0 + d) - f(theta0))
        nonlinearity          = |f(theta0 + alpha d) - line| / |f(theta0 + d) - f(theta0)|
        relative merge error  = |f(theta0 + alpha d) - line| / |line|
        change                = |f(theta0 + d) - f(theta0)| / |f(theta0)|

    0 / 0 is 0: a function that stays the same is linear, and the limit of a small d is 0 for any smooth function.
    Something over 0 is None.
    """
    import torch

    start, end, between = (side.double() for side in (start, end, between))
    line = torch.lerp(start, end, alpha)  # exact at both ends, and where they are equal
    bend, moved = float((between - line).norm()), float((end - start).norm())
    return ratio(bend, moved), ratio(bend, float(line.norm())), ratio(moved, float(start.norm()))


def ratio(value: float, unit: float) -> float | None:
    """value / unit; 0 where both are 0, None where only the unit is."""
    return value / unit if unit else (None if value else 0.0)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those there are; None: there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation coefficient; None where it is undefined: fewer than two pairs, or one side constant."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    dx, dy = ([value - math.fsum(side) / len(side) for value in side] for side in (xs, ys))
    x_norm, y_norm = math.hypot(*dx), math.hypot(*dy)
    if not x_norm or not y_norm:
        return None
    return max(-1.0, min(1.0, math.fsum((x / x_norm) * (y / y_norm) for x, y in zip(dx, dy, strict=True))))
