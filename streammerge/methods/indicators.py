"""Comparisons as numbers, 1 where they hold and 0 elsewhere, in the dtype of what is compared; and what goes with it.

On a CPU torch makes numbers of a comparison a whole vector at a time, booleans one by one: four times slower, and
slower still where they are then used to multiply, to fill or to choose by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def at_least(values: Tensor, bound: float | Tensor) -> Tensor:
    """values >= bound"""
    return _compared("ge", values, bound)


def above(values: Tensor, bound: float | Tensor) -> Tensor:
    """values > bound"""
    return _compared("gt", values, bound)


def below(values: Tensor, bound: float | Tensor) -> Tensor:
    """values < bound"""
    return _compared("lt", values, bound)


def equal(values: Tensor, other: float | Tensor) -> Tensor:
    """values == other"""
    return _compared("eq", values, other)


def unequal(values: Tensor, other: float | Tensor) -> Tensor:
    """values != other; NaN differs from everything."""
    return _compared("ne", values, other)


def one_for_zero(values: Tensor) -> Tensor:
    """The values, and 1 in the place of every 0: something to divide by."""
    return equal(values, 0).add_(values)


def count(ones: Tensor) -> int:
    """How many ones there are among zeros and ones."""
    wide = ones if ones.numel() <= 1 << 24 else ones.double()  # float32 holds every number up to there
    return int(wide.sum())


def scaled(values: Tensor, factor: float) -> Tensor:
    """The values times the factor; themselves where it is 1."""
    return values if factor == 1 else values * factor


def _compared(name: str, values: Tensor, other: float | Tensor) -> Tensor:
    import torch

    found: Tensor = getattr(torch, name)(values, other, out=torch.empty_like(values))
    return found
