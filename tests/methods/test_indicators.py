"""Comparisons as numbers against torch's booleans."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streammerge.methods.indicators import above, at_least, below, count, equal, one_for_zero, scaled, unequal

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([-INF, -2.0, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, INF, NAN])
PAIRS = {operator.ge: at_least, operator.gt: above, operator.lt: below, operator.eq: equal, operator.ne: unequal}


@pytest.mark.parametrize("plain", PAIRS, ids=lambda plain: plain.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_ones_are_where_the_comparison_holds(plain: Callable[[Any, Any], Any], dtype: torch.dtype) -> None:
    values = VALUES.nan_to_num(7, 9, -9).to(dtype) if dtype == torch.int32 else VALUES.to(dtype)
    table, others = values.repeat(len(values), 1), values[:, None].expand(len(values), -1)
    for bound in (0, 1, others):
        found = PAIRS[plain](table, bound)
        assert found.dtype == dtype
        assert torch.equal(found, plain(table, bound).to(dtype))


def test_something_to_divide_by() -> None:
    found = one_for_zero(VALUES)
    expected = VALUES.masked_fill(VALUES == 0, 1.0)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_nothing_is_lost_by_leaving_out_a_factor_of_one() -> None:
    assert same_bits(scaled(VALUES, 1.0), VALUES * 1.0)
    assert same_bits(scaled(VALUES, -0.5), VALUES * -0.5)


def test_ones_beyond_what_float32_counts() -> None:
    """2^24 + 1 is no float32."""
    ones = torch.ones(1).expand((1 << 24) + 1)
    assert count(ones) == (1 << 24) + 1
    assert count(torch.tensor([1.0, 0.0, 1.0])) == 2
