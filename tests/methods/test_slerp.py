"""Slerp: by hand, against a float64 interpolation in memory, and where there is no angle."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from torch import Tensor

from streammerge.errors import RecipeError


def of(base: Any, expert: Any) -> Models:
    return Models({"w": torch.as_tensor(base)}, [{"w": torch.as_tensor(expert)}], {})


def naive_slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """In float64, the angle by the arc tangent of the vectors' sum and difference."""
    a, b = first.double(), second.double()
    u, v = a / a.norm(), b / b.norm()
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.0, [2.0, 0.0]),
        (1.0, [0.0, 1.0]),
        (0.5, [2 * math.sqrt(0.5), math.sqrt(0.5)]),  # sin 45 / sin 90 of each
        (1 / 3, [2 * math.sqrt(0.75), 0.5]),  # sin 60 and sin 30
        (-1 / 3, [2 * math.sqrt(0.75), -0.5]),  # beyond the base: sin 120 and sin -30
    ],
)
def test_by_hand(t: float, expected: list[float]) -> None:
    merged = merge("slerp", of([2.0, 0.0], [0.0, 1.0]), t=t)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor(expected))
    assert merged.reports["w"]["angle"] == pytest.approx(math.pi / 2)
    assert merged.reports["w"]["base_coefficient"] == pytest.approx(expected[0] / 2)
    assert merged.reports["w"]["coefficient"] == pytest.approx([expected[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_equals_the_naive_reference(dtype: torch.dtype, t: float) -> None:
    models = make_models(1, dtype=dtype)
    for name, tensor in merge("slerp", models, t=t).tensors.items():
        expected = naive_slerp(models.base[name], models.experts[0][name], t).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 1e-3, 0.03, 1.0, 3.0])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_coefficients_at_any_angle(angle: float, t: float) -> None:
    """Also where mergekit interpolates linearly, below 0.032 rad."""
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = 2 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    merged = merge("slerp", of(first, second), t=t)
    report = merged.reports["w"]
    assert report["base_coefficient"] == pytest.approx(math.sin((1 - t) * angle) / math.sin(angle), rel=1e-9)
    assert report["coefficient"][0] == pytest.approx(math.sin(t * angle) / math.sin(angle), rel=1e-9)
    assert report["base_coefficient"] + report["coefficient"][0] >= 1 - 1e-15
    torch.testing.assert_close(merged.tensors["w"], naive_slerp(first, second, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "expert", "expected", "angle"),
    [
        ([0.0, 0.0], [4.0, 8.0], [1.0, 2.0], None),
        ([4.0, 8.0], [0.0, 0.0], [3.0, 6.0], None),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], None),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], 0.0),
        ([4.0, 0.0], [8.0, 0.0], [5.0, 0.0], 0.0),  # collinear
        ([4.0, 8.0], [-4.0, -8.0], [2.0, 4.0], None),  # antipodal: linear
        (4.0, -4.0, 2.0, None),
        ([[4.0]], [[8.0]], [[5.0]], None),
        ([], [], [], None),
    ],
)
def test_degenerate(base: Any, expert: Any, expected: Any, angle: float | None) -> None:
    merged = merge("slerp", of(base, expert), t=0.25)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor(expected))
    assert merged.reports["w"]["angle"] == angle


def test_one_model_and_no_more() -> None:
    with pytest.raises(RecipeError, match="method slerp merges the base with one fine-tuned model, not 2"):
        resolve("slerp", experts=2)
    with pytest.raises(RecipeError, match="method slerp has no parameter 'coefficient'"):
        resolve("slerp", coefficient=0.5)
