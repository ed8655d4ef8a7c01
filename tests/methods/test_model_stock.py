"""Model Stock: by hand, clamped, by rows, and against float64 in memory."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from torch import Tensor

from streammerge.errors import RecipeError


def of(*tensors: Any) -> Models:
    """The first is the base."""
    values = [{"w": torch.as_tensor(tensor)} for tensor in tensors]
    return Models(values[0], values[1:], {})


def naive_model_stock(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """w = t * mean + (1 - t) * base, in float64, of one vector."""
    wide, n = base.double(), len(experts)
    deltas = [(expert.double() - wide).flatten() for expert in experts]
    cosines = [torch.cosine_similarity(a, b, 0, eps=0) for a, b in itertools.combinations(deltas, 2)]
    cosine = torch.stack(cosines).mean().clamp(0, 1)
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * torch.stack([expert.double() for expert in experts]).mean(0) + (1 - t) * wide


def test_by_hand() -> None:
    """Task vectors (2, 0) and (1, 1) / their cosine is sqrt 0.5; t = 2c / (1 + c)."""
    merged = merge("model_stock", of([1.0, 1.0], [3.0, 1.0], [2.0, 2.0]))
    ratio = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([1 + 1.5 * ratio, 1 + 0.5 * ratio]))
    report = merged.reports["w"]
    assert report["coefficient"] == pytest.approx([ratio / 2] * 2)
    assert report["cosine"] == pytest.approx(0.5**0.5)
    assert report["ratio"] == pytest.approx(ratio)


def test_rows_by_hand() -> None:
    """Rows: the same task vectors (t = 1), a right angle (t = 0), and none."""
    base = torch.zeros(3, 2)
    first, second = [[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    merged = merge("model_stock", of(base, first, second), filter_wise=True)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert merged.reports["w"] == {"coefficient": [None, None]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [2, 3, 4])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_equals_the_naive_reference(dtype: torch.dtype, experts: int, filter_wise: bool) -> None:
    models = make_models(experts, dtype=dtype, extra={"model.layers.0.stack": (2, 5, 4)})
    shared = {name: torch.randn(tensor.shape) for name, tensor in models.base.items()}  # a common direction: c > 0
    tuned = [{n: (t.float() + shared[n]).to(dtype) for n, t in expert.items()} for expert in models.experts]
    models = Models(models.base, tuned, {})
    for name, tensor in merge("model_stock", models, filter_wise=filter_wise).tensors.items():
        base, *others = (model[name].float() for model in (models.base, *models.experts))
        if filter_wise and base.dim() > 1:
            rows = zip(*(values.reshape(-1, base.shape[-1]) for values in (base, *others)), strict=True)
            expected = torch.stack([naive_model_stock(row[0], row[1:]) for row in rows]).view(base.shape)
        else:
            expected = naive_model_stock(base, others)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([[[1.0, 2.0]], [[1.0, 2.0]], [[1.0, 2.0]]], [[1.0, 2.0]]),
        ([[[1.0, 2.0]], [[2.0, 4.0]], [[2.0, 4.0]]], [[2.0, 4.0]]),  # they agree: their mean
        ([[[1.0, 2.0]], [[2.0, 4.0]], [[3.0, 6.0]]], [[2.5, 5.0]]),  # collinear
        ([[[1.0, 2.0]], [[2.0, 4.0]], [[0.0, 0.0]]], [[1.0, 2.0]]),  # opposite: clamped, the base
        ([[[0.0, 0.0]], [[2.0, 1.0]], [[-2.0, 0.5]]], [[0.0, 0.0]]),
        ([[[0.0, 0.0]], [[2.0, 1.0]], [[0.0, 0.0]]], [[0.0, 0.0]]),  # one zero task vector: cosine 0
        ([[[0.0, 0.0]], [[1e-6, 0.0]], [[1e-6, 0.0]]], [[1e-6, 0.0]]),  # short ones have an angle too
        ([[1.0, 2.0], [2.0, 4.0], [2.0, 4.0]], [2.0, 4.0]),
        ([1.0, 2.0, 4.0], 3.0),
        ([1.0, 2.0, 0.0], 1.0),
        ([[[1.0]], [[2.0]], [[4.0]]], [[3.0]]),
        ([[], [], []], []),
    ],
)
def test_degenerate(filter_wise: bool, tensors: list[Any], expected: Any) -> None:
    merged = merge("model_stock", of(*tensors), filter_wise=filter_wise).tensors["w"]
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=1e-6, atol=0)


def test_never_beyond_the_models() -> None:
    """Three that disagree as much as three can: mergekit's ratio would be -3 c / (1 + 2 c) with c near -1/2."""
    experts = [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5) + 1e-3]]
    merged = merge("model_stock", of([0.0, 0.0], *experts))
    assert merged.tensors["w"].tolist() == [0.0, 0.0]
    assert merged.reports["w"]["ratio"] == 0
    assert merged.reports["w"]["cosine"] == pytest.approx(-0.5, abs=1e-3)


def test_two_models_at_least() -> None:
    with pytest.raises(RecipeError, match="method model_stock needs two fine-tuned models or more"):
        resolve("model_stock")
    with pytest.raises(RecipeError, match="method model_stock: filter_wise"):
        resolve("model_stock", experts=2, filter_wise="rows")
