"""How far apart two merges are.

Sums cancel: where base + task vector is near zero, one rounding of either is many units of the result. So the unit is
that of the largest magnitude at the position, among the models and the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA_BITS = 24  # of float32, with the hidden one


def ulp(magnitudes: Tensor) -> Tensor:
    """The unit in the last place of float32 at these magnitudes, float64: 2^(e - 24) for m in [2^(e-1), 2^e).

    At least that of the smallest normal number.
    """
    exponents = torch.frexp(magnitudes.double().clamp(min=torch.finfo(torch.float32).tiny))[1]
    return torch.ldexp(torch.ones_like(magnitudes, dtype=torch.float64), exponents - MANTISSA_BITS)


def gaps(left: Tensor, right: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """|left - right| in these units, float64; infinite where either is NaN."""
    return ((left.double() - right.double()).abs() / unit).nan_to_num(nan=torch.inf, posinf=torch.inf)


def largest(values: Tensor) -> float:
    """The largest value, 0 where there is none."""
    return values.max().item() if values.numel() else 0.0
