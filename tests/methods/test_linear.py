"""Linear averaging: by hand, and against the naive reference."""

from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from naive import naive_linear

from streammerge.errors import RecipeError

MODELS = Models(
    {"w": torch.tensor([1.0, 2.0])}, [{"w": torch.tensor([3.0, -2.0])}, {"w": torch.tensor([8.0, 6.0])}], {}
)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [4.0, 2.0]),  # ((1, 2) + (3, -2) + (8, 6)) / 3
        ({"coefficient": [1, 2]}, [5.0, 3.0]),  # ((1, 2) + (3, -2) + 2 (8, 6)) / 4
        ({"base_coefficient": 0}, [5.5, 2.0]),  # mergekit's linear: ((3, -2) + (8, 6)) / 2
        ({"base_coefficient": 2, "coefficient": [1, -1]}, [-1.5, -2.0]),  # (2 (1, 2) + (3, -2) - (8, 6)) / 2
        ({"normalize": False}, [12.0, 6.0]),
        ({"normalize": False, "base_coefficient": 1, "coefficient": [-0.5, -0.5]}, [-4.5, 0.0]),
    ],
)
def test_by_hand(parameters: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(merge("linear", MODELS, **parameters).tensors["w"], torch.tensor(expected))


def test_one_expert_is_the_mean_with_the_base() -> None:
    merged = merge("linear", Models(MODELS.base, MODELS.experts[:1], {}))
    assert merged.tensors["w"].tolist() == [2.0, 0.0]
    assert merged.reports["w"] == {"coefficient": [0.5]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_reference(dtype: torch.dtype) -> None:
    models = make_models(3, dtype=dtype)
    merged = merge("linear", models, base_coefficient=0.3, coefficient=[0.9, 0.1, 2.0])
    for name, tensor in naive_linear([models.base, *models.experts], [0.3, 0.9, 0.1, 2.0]).items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6)
    assert merged.reports["model.norm.weight"]["coefficient"] == pytest.approx([0.9 / 3.3, 0.1 / 3.3, 2 / 3.3])


def test_coefficients_that_sum_to_zero() -> None:
    with pytest.raises(RecipeError, match="method linear: the coefficients sum to 0.*normalize"):
        resolve("linear", coefficient=-1)
    assert merge("linear", Models(MODELS.base, MODELS.experts[:1], {}), coefficient=-1, normalize=False).tensors[
        "w"
    ].tolist() == [-2.0, 4.0]
