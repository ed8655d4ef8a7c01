"""Linear averaging: by hand, and against the naive reference."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from naive import naive_linear

from streammerge.errors import RecipeError
from streammerge.methods import api

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


# ---- norm_rescale -----------------------------------------------------------------------------------------------


def rescaled(*tensors: Any, **parameters: Any) -> torch.Tensor:
    values = [{"w": torch.as_tensor(tensor)} for tensor in tensors]
    return merge("linear", Models(values[0], values[1:], {}), norm_rescale=True, **parameters).tensors["w"]


def test_by_hand_with_the_mean_norm() -> None:
    """(4, 0) and (0, 3): their mean (2, 1.5) is 2.5 long, their mean length is 3.5: times 1.4. With weights 1 and 2:
    (4, 6) / 3 is sqrt(52) / 3 long, the mean length 10 / 3."""
    torch.testing.assert_close(rescaled([4.0, 0.0], [0.0, 3.0]), torch.tensor([2.8, 2.1]))
    root = math.sqrt(52)
    torch.testing.assert_close(
        rescaled([4.0, 0.0], [0.0, 3.0], coefficient=2), torch.tensor([40 / root, 60 / root]) / 3
    )
    # not normalised: (4, 0) - 0.5 (0, 3) is sqrt(18.25) long, 4 - 0.5 * 3 = 2.5
    torch.testing.assert_close(
        rescaled([4.0, 0.0], [0.0, 3.0], coefficient=-0.5, normalize=False),
        torch.tensor([4.0, -1.5]) * 2.5 / math.sqrt(18.25),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_are_the_mean_of_the_norms(dtype: torch.dtype) -> None:
    models = make_models(3, dtype=dtype)
    coefficients = [0.3, 0.9, 0.1, 2.0]
    merged = merge("linear", models, base_coefficient=0.3, coefficient=[0.9, 0.1, 2.0], norm_rescale=True)
    for name, tensor in naive_linear([models.base, *models.experts], coefficients).items():
        inputs = [model[name].double() for model in (models.base, *models.experts)]
        norm = sum(c * float(t.norm()) for c, t in zip(coefficients, inputs, strict=True)) / 3.3
        mean = sum(c * t for c, t in zip(coefficients, inputs, strict=True)) / 3.3
        factor = norm / float(mean.norm())
        assert merged.reports[name]["rescale"] == pytest.approx(factor, rel=1e-10)
        torch.testing.assert_close(merged.tensors[name], tensor * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-8, 1e-4, 0.1, 2.0, 3.14])
def test_the_factor_at_any_angle(angle: float) -> None:
    """Two vectors as long as each other: their mean is shorter by the cosine of half the angle between them."""
    second = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    models = Models({"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}, [{"w": second}], {})
    report = merge("linear", models, norm_rescale=True).reports["w"]
    assert report["rescale"] == pytest.approx(1 / math.cos(angle / 2), rel=1e-9)


@pytest.mark.parametrize(
    ("tensors", "parameters", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], {}, [0.0, 0.0]),
        ([[0.0, 0.0], [2.0, 4.0]], {}, [1.0, 2.0]),
        ([[1.0, 2.0], [-1.0, -2.0]], {}, [0.0, 0.0]),  # a zero mean stays
        ([[0.1, 0.7, 0.3], [-0.1, -0.7, -0.3], [0.0, 0.0, 0.0]], {}, [0.0, 0.0, 0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], {"base_coefficient": -1, "normalize": False}, [-1.0, 1.0]),  # a mean length of 0
        ([[2.0, 0.0], [0.0, 1.0]], {"base_coefficient": -1, "normalize": False}, [-2.0, 1.0]),  # a negative one
        ([-2.0, 4.0], {}, 3.0),  # numbers: 1, and the mean of 2 and 4
        ([[], []], {}, []),
    ],
)
def test_norms_that_say_nothing(tensors: list[Any], parameters: dict[str, Any], expected: Any) -> None:
    torch.testing.assert_close(rescaled(*tensors, **parameters), torch.tensor(expected))


def test_what_is_not_finite_is_only_averaged() -> None:
    found = rescaled([1.0, 2.0], [math.inf, 4.0])
    assert found.tolist() == [math.inf, 3.0]
    wide = [torch.tensor([1e200, 0.0], dtype=torch.float64), torch.tensor([0.0, 2e200], dtype=torch.float64)]
    assert rescaled(*wide).tolist() == [0.5e200, 1e200]  # their squares overflow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_models_return_themselves_rescaled(dtype: torch.dtype) -> None:
    models = make_models(0, dtype=dtype)
    models.experts.extend([models.base] * 2)
    merged = merge("linear", models, norm_rescale=True, base_coefficient=0.5, coefficient=0.25)
    for name, tensor in models.base.items():
        assert torch.equal(merged.tensors[name], tensor.to(merged.tensors[name].dtype))
        assert merged.reports[name]["rescale"] == 1


@pytest.mark.parametrize("elements", [1, 12, 37])
def test_norms_in_row_blocks_of_any_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2, extra={"stack": (2, 5, 4)})
    whole = merge("linear", models, norm_rescale=True)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    cut = merge("linear", models, norm_rescale=True)
    assert cut.reports == whole.reports
    assert all(torch.equal(cut.tensors[name], tensor) for name, tensor in whole.tensors.items())
