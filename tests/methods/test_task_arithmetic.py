"""Task arithmetic: by hand, and against the naive reference."""

import pytest
import torch
from methods.driver import Models, make_models, merge
from naive import naive_task_arithmetic

# Task vectors (2, -4) and (8, 4).
MODELS = Models(
    {"w": torch.tensor([1.0, 2.0])}, [{"w": torch.tensor([3.0, -2.0])}, {"w": torch.tensor([9.0, 6.0])}], {}
)


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    [
        ([0.5, 0.25], [4.0, 1.0]),  # (1, 2) + (1, -2) + (2, 1)
        ([1, -0.5], [-1.0, -4.0]),
        ([0, 0], [1.0, 2.0]),
        (1, [11.0, 2.0]),  # one value for both
    ],
)
def test_by_hand(coefficient: float | list[float], expected: list[float]) -> None:
    assert merge("task_arithmetic", MODELS, coefficient=coefficient).tensors["w"].tolist() == expected


def test_the_default_coefficient() -> None:
    merged = merge("task_arithmetic", Models(MODELS.base, MODELS.experts[:1], {}))
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([2.4, -0.8]))  # (1, 2) + 0.7 (2, -4)
    assert merged.reports["w"] == {"coefficient": [0.7]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_reference(dtype: torch.dtype) -> None:
    models = make_models(3, dtype=dtype)
    coefficients = [0.7, -0.2, 0.4]
    merged = merge("task_arithmetic", models, coefficient=coefficients)
    for name, tensor in naive_task_arithmetic(models.base, models.experts, coefficients).items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6)
