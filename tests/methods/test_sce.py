"""SCE: by hand, and against a naive truth that sorts the whole tensor."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.sparse_truth import of
from torch import Tensor

from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods import api

# Variances 1, 4, 4, 0; energies 21 and 17; sums 6, 0, -2, 0: elected +, +, -, +.
TWO = of([4.0, -2.0, 1.0, 0.0], [2.0, 2.0, -3.0, 0.0])


@pytest.mark.parametrize(
    ("models", "parameters", "expected", "coefficients"),
    [
        # (21 * 4 + 17 * 2) / 38; the second's 2; the second's -3
        (TWO, {}, [118 / 38, 2.0, -3.0, 0.0], [21 / 38, 17 / 38]),
        # k = floor(0.5 * 3) = 1, of the two variances of 4 the first: (-2) and (2), a sum of zero counts as +
        (TWO, {"select_topk": 0.5}, [0.0, 2.0, 0.0, 0.0], [0.5, 0.5]),
        # k = floor(2.1): (-2, 1) and (2, -3), energies 5 and 13
        (TWO, {"select_topk": 0.7}, [0.0, 2.0, -3.0, 0.0], [5 / 18, 13 / 18]),
        (TWO, {"select_topk": 0.99}, [0.0, 2.0, -3.0, 0.0], [5 / 18, 13 / 18]),
        (TWO, {"select_topk": 0}, [0.0, 0.0, 0.0, 0.0], [0.5, 0.5]),
        # energies 9, 1, 5: (9 * 3 + 1 * 1) / (9 + 1); the third's 2. On top of the base
        (of([3.0, 0.0], [1.0, 0.0], [-1.0, 2.0], base=1.0), {}, [3.8, 3.0], [9 / 15, 1 / 15, 5 / 15]),
        # the same change in both has no variance: nothing to select, which leaves the base
        (of([1.0, 2.0], [1.0, 2.0]), {"select_topk": 0.9}, [0.0, 0.0], [0.5, 0.5]),
        (of([1.0, 2.0], [1.0, 2.0]), {}, [1.0, 2.0], [0.5, 0.5]),
        (of([0.0, 0.0], [0.0, 0.0]), {}, [0.0, 0.0], [0.5, 0.5]),
        # tiny task vectors have their own coefficients: energies 9 and 1, (9 * 3 + 1 * 1) / 10
        (of([3e-5, 0.0], [1e-5, 0.0]), {}, [2.8e-5, 0.0], [0.9, 0.1]),
        (of([1.0, -2.0]), {}, [1.0, -2.0], [1.0]),
    ],
)
def test_by_hand(models: Models, parameters: dict[str, Any], expected: list[float], coefficients: list[float]) -> None:
    found = merge("sce", models, **parameters)
    assert found.tensors["w"].tolist() == pytest.approx(expected, rel=1e-6)
    assert found.reports["w"]["coefficient"] == pytest.approx(coefficients, rel=1e-6)


def naive_sce(base: Tensor, experts: list[Tensor], share: float) -> tuple[Tensor, list[float], int]:
    """In float64, all models stacked; a stable sort puts the first of equal variances first."""
    vectors = torch.stack([(expert.float() - base.float()).double() for expert in experts])
    kept = base.numel()
    if share < 1:
        variance = vectors.var(0, correction=0).float().flatten()
        variance[(vectors == vectors[0]).all(0).flatten()] = 0.0
        kept = math.floor(share * int((variance != 0).sum()))
        mask = torch.zeros(base.numel(), dtype=torch.bool)
        mask[variance.argsort(descending=True, stable=True)[:kept]] = True
        vectors = vectors * mask.view(base.shape)
    energies = vectors.reshape(len(experts), -1).square().mean(1)
    a = energies / energies.sum() if energies.sum() else torch.full_like(energies, 1 / len(experts))
    weights = a.view(-1, *[1] * base.dim()).expand(vectors.shape)
    agrees = torch.where(vectors.sum(0) >= 0, vectors > 0, vectors < 0)
    divisor = (weights * agrees).sum(0)
    merged = (weights * vectors * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    return (base.double() + merged).float(), a.tolist(), kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.55, 1.0])
def test_equals_the_naive_truth(dtype: torch.dtype, experts: int, share: float) -> None:
    """A third of the entries is untouched, and one matrix is: a selection of nothing."""
    models = make_models(experts, dtype=dtype, extra={"model.layers.0.stack": (2, 5, 4), "big": (40, 50), "scalar": ()})
    frozen = "model.layers.1.self_attn.q_proj.weight"
    for expert in models.experts:
        for key, base in models.base.items():
            untouched = torch.arange(base.numel()).view(base.shape) % 3 == 0
            expert[key] = torch.where(untouched, base, expert[key])
        expert[frozen] = models.base[frozen]
    found = merge("sce", models, select_topk=share)
    for key, base in models.base.items():
        expected, a, kept = naive_sce(base, [expert[key] for expert in models.experts], share)
        torch.testing.assert_close(found.tensors[key], expected, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        assert found.reports[key]["coefficient"] == pytest.approx(a, rel=1e-9)
        assert found.reports[key].get("kept") == (kept if share < 1 else None)
    assert torch.equal(found.tensors[frozen], models.base[frozen].float())


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("elements", [1, 37, 200])
def test_a_selection_in_row_blocks_of_any_size(experts: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 task vectors: many variances tie."""
    models = make_models(experts, extra={"big": (40, 50)})
    whole = merge("sce", models, select_topk=0.3)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    cut = merge("sce", models, select_topk=0.3)
    assert cut.reports == whole.reports
    assert all(torch.equal(cut.tensors[key], tensor) for key, tensor in whole.tensors.items())


def test_a_selection_does_not_depend_on_the_order_of_the_models() -> None:
    models = make_models(3, dtype=torch.float32, extra={"big": (40, 50)})
    found = merge("sce", models, select_topk=0.3).tensors
    turned = merge("sce", Models(models.base, models.experts[1:] + models.experts[:1], {}), select_topk=0.3).tensors
    for key, tensor in found.items():
        torch.testing.assert_close(turned[key], tensor, rtol=1e-6, atol=1e-6)


def test_what_nobody_changed_keeps_its_bits() -> None:
    base = {"w": torch.tensor([-0.0, 1.0])}
    found = merge("sce", Models(base, [{"w": torch.tensor([0.0, 2.0])}] * 2, {})).tensors["w"]
    assert found.view(torch.int32).tolist() == torch.tensor([-0.0, 2.0]).view(torch.int32).tolist()


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_coefficients(value: float, share: float) -> None:
    with pytest.raises(CheckpointError, match="^tensor 'w': a value is not finite.*no coefficients"):
        merge("sce", of([1.0, value], [2.0, 1.0]), select_topk=share)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"select_topk": 1.5}, "method sce: select_topk: .*1"),
        ({"select_topk": -0.1}, "method sce: select_topk: .*0"),
        ({"select_topk": 0.5}, "method sce: one fine-tuned model has no variance.*select_topk"),
        ({"coefficient": 1}, "method sce has no parameter 'coefficient'"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("sce", **parameters)
