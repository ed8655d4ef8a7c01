"""The formulas, by hand and in closed form."""

import math

import numpy
import pytest
import torch
from diagnose.truth import rank

from streammerge.diagnose.numbers import (
    activation_variance,
    distances_from_linear,
    effective_rank,
    mean,
    pearson,
    ratio,
)
from streammerge.diagnose.settings import RankOf

KINDS: list[RankOf] = ["eigenvalues", "singular"]


def test_variance_by_hand() -> None:
    """Features (0, 2) and (2, 6): population variances 1 and 4."""
    assert activation_variance(torch.tensor([[0.0, 2], [2, 6]], dtype=torch.float64)) == 2.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [3, 6, 20])
def test_r_orthogonal_directions_of_equal_length_have_rank_r(kind: RankOf, features: int) -> None:
    """Plus and minus r unit vectors, whose mean is zero; with fewer and with more features than tokens."""
    for r in range(1, 4):
        hidden = torch.cat(
            [torch.eye(features, dtype=torch.float64)[:r], -torch.eye(features, dtype=torch.float64)[:r]]
        )
        assert effective_rank(3 * hidden, kind) == pytest.approx(r, rel=1e-12)


@pytest.mark.parametrize(("kind", "shares"), [("eigenvalues", (0.8, 0.2)), ("singular", (2 / 3, 1 / 3))])
def test_rank_by_hand(kind: RankOf, shares: tuple[float, float]) -> None:
    """(+-2, 0) and (0, +-1): eigenvalues 4 to 1, singular values 2 to 1."""
    hidden = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]], dtype=torch.float64)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(hidden, kind) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_rank_beside_singular_values_of_the_matrix(kind: RankOf, shape: tuple[int, int]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effective_rank(hidden, kind) == pytest.approx(rank(hidden, kind == "singular"), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_is_no_direction(kind: RankOf) -> None:
    hidden = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effective_rank(hidden + 1000, kind) == pytest.approx(effective_rank(hidden, kind), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_activations_for_all_tokens_have_rank_0(kind: RankOf) -> None:
    hidden = torch.full((7, 5), 0.1, dtype=torch.float64)
    assert (effective_rank(hidden, kind), activation_variance(hidden)) == (0, 0)


def test_the_input_is_left_alone() -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64)
    before = hidden.clone()
    effective_rank(hidden)
    activation_variance(hidden)
    assert torch.equal(hidden, before)


def test_distances_by_hand() -> None:
    """From (0, 1) to (4, 1) by way of (1, 3): the middle of the line is (2, 1), (1, 3) is sqrt 5 away from it."""
    start, end, between = (torch.tensor(values) for values in ([0.0, 1.0], [4.0, 1.0], [1.0, 3.0]))
    found = distances_from_linear(start, end, between, 0.5)
    assert found == pytest.approx((math.sqrt(5) / 4, 1.0, 4.0), rel=1e-15)
    quarter = distances_from_linear(start, end, torch.tensor([1.0, 1.0]), 0.25)
    assert quarter == pytest.approx((0, 0, 4))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_nothing_changed_is_linear(alpha: float) -> None:
    values = torch.randn(50)
    assert distances_from_linear(values, values, values, alpha) == (0, 0, 0)


def test_a_way_round_to_the_same_place_has_no_score() -> None:
    start, between = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    assert distances_from_linear(start, start, between, 0.5) == (None, 1, 0)
    assert distances_from_linear(-start, start, start, 0.5) == (0.5, None, 2)


def test_ratios_and_means() -> None:
    assert (ratio(3, 2), ratio(0, 0), ratio(1, 0)) == (1.5, 0, None)
    assert (mean([1, None, 2]), mean([None]), mean([])) == (1.5, None, None)


def test_pearson_by_hand() -> None:
    """Deviations (-1, 0, 1) and (-7, -1, 8) / 3: 5 / sqrt(2 * 114 / 9)."""
    assert pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / math.sqrt(2 * 114 / 9), rel=1e-15)
    assert pearson([1, 2, 3], [-2, -4, -6]) == pytest.approx(-1, rel=1e-15)
    xs, ys = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    assert pearson(xs, ys) == pytest.approx(numpy.corrcoef(xs, ys)[0, 1], rel=1e-12)


@pytest.mark.parametrize(
    ("xs", "ys"), [([], []), ([1], [2]), ([1, 1], [2, 3]), ([1, 2], [0.1, 0.1]), ([0.1] * 3, [1, 2, 3])]
)
def test_pearson_where_it_is_undefined(xs: list[float], ys: list[float]) -> None:
    assert pearson(xs, ys) is None


def test_pearson_of_numbers_whose_squares_vanish() -> None:
    assert pearson([0, 1e-200, 2e-200], [0, 1e-180, 2e-180]) == pytest.approx(1, rel=1e-15)
