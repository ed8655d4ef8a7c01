"""Scores and merge coefficients in closed form."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.fisher.coefficients import Importance, merge_coefficients, score

INF = math.inf
MOST, LEAST = 0.5, 1 / (1 + math.exp(-1))  # what adaptive theta always attains: 0.5 and 0.7310585786

SCORES = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("importance", "value"), [("product", 4.0 * 0.5), ("fim", 4.0), ("norm", 0.5), ("quadratic", 3.0)]
)
def test_scores(importance: Importance, value: float) -> None:
    assert score(importance, 4.0, 0.5, 3.0) == pytest.approx(math.log(value), rel=1e-15)


@pytest.mark.parametrize(
    ("importance", "means"),
    [
        ("product", (0.0, 1.0, 1.0)),
        ("product", (1.0, 0.0, 1.0)),
        ("fim", (0.0, 1.0, 1.0)),
        ("norm", (1.0, 0.0, 1.0)),
        ("quadratic", (1.0, 1.0, 0.0)),
    ],
)
def test_no_importance_at_all(importance: Importance, means: tuple[float, float, float]) -> None:
    assert score(importance, *means) == -INF


def test_a_product_that_underflows_still_has_its_score() -> None:
    assert 1e-200 * 1e-180 == 0
    assert score("product", 1e-200, 1e-180, 0.0) == pytest.approx(-380 * math.log(10))
    assert merge_coefficients([score("product", f, 1e-180, 0.0) for f in (1e-200, 1e-190, 1e-180)]) == pytest.approx(
        [LEAST, 1 / (1 + math.exp(-0.5)), MOST]
    )


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 4.0, 2.0], [LEAST, MOST, 0.6224593312]),  # 1 - sigmoid(-1), 1 - sigmoid(0), 1 - sigmoid(-0.5)
        ([-7.0, -3.0, -6.0], [LEAST, MOST, 0.6791786992]),  # 1 - sigmoid(-0.75)
        ([0.0, 4.0, -INF], [LEAST, MOST, LEAST]),  # without importance: as the least important
        ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]),
        ([1.0, -INF], [0.5, 0.5]),
        ([-INF, -INF], [0.5, 0.5]),
        ([3.0], [0.5]),
        ([-INF], [0.5]),
        ([], []),
    ],
)
def test_adaptive(scores: list[float], expected: list[float]) -> None:
    assert merge_coefficients(scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("theta", "expected"),
    [
        (0.0, [0.5, 0.5, 0.5]),
        (0.25, [0.7310585786, 0.5, 0.6224593312]),  # 1 / range: the adaptive one
        (1.0, [0.9820137900, 0.5, 0.8807970780]),  # 1 - sigmoid(-4), 1 - sigmoid(-2)
        (1e9, [1.0, 0.5, 1.0]),  # as steep as can be, and no overflow
    ],
)
def test_a_theta_of_ones_own(theta: float, expected: list[float]) -> None:
    assert merge_coefficients([0.0, 4.0, 2.0], theta) == pytest.approx(expected)
    assert merge_coefficients([0.0, 4.0, 2.0, -INF], theta) == pytest.approx([*expected, expected[0]])


@pytest.mark.parametrize("step", [5e-324, 1e-300, math.ulp(1.0)])
def test_the_smallest_ranges_attain_both_ends(step: float) -> None:
    assert merge_coefficients([0.0, step]) == [LEAST, MOST]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.just(-INF) | SCORES, min_size=1, max_size=8))
def test_range_ends_and_order(scores: list[float]) -> None:
    alphas = merge_coefficients(scores)
    assert all(MOST <= alpha <= LEAST for alpha in alphas)
    scored = [s for s in scores if s > -INF]
    if len(set(scored)) > 1:
        assert alphas[scores.index(max(scored))] == MOST and alphas[scores.index(min(scored))] == LEAST
    for s, alpha in zip(scores, alphas, strict=True):
        assert all(alpha <= other for t, other in zip(scores, alphas, strict=True) if s > t), (
            "more important, less moved"
        )


@pytest.mark.parametrize("importance", ["product", "fim", "norm", "quadratic"])
@pytest.mark.parametrize("factor", [1e-12, 1 / 8, 63.0, 1e15])
def test_a_common_factor_changes_nothing(importance: Importance, factor: float) -> None:
    """Sums or means over tokens, samples or parameters, or another loss scale: all the same."""
    means = [(4.4e-3, 2e-5, 9e-8), (2.6e-6, 3e-4, 8e-10), (1e-4, 1e-4, 1e-8)]
    alphas = merge_coefficients([score(importance, *m) for m in means])
    scaled = merge_coefficients([score(importance, *(factor * x for x in m)) for m in means])
    assert scaled == pytest.approx(alphas, rel=1e-12)
    assert len(set(alphas)) == 3
