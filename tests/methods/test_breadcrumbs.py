"""Breadcrumbs: by hand, and against a naive truth that sorts the whole tensor."""

from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.sparse_truth import combine, of
from torch import Tensor

from streammerge.errors import RecipeError
from streammerge.methods import api

METHODS = ["breadcrumbs", "breadcrumbs_ties"]
FIVE = of([5.0, -4.0, 3.0, -2.0, 1.0])
TWO = of([5.0, -4.0, 3.0, -2.0, 1.0], [-1.0, 2.0, -3.0, -4.0, 5.0])


def naive_mask(vector: Tensor, density: float, gamma: float) -> Tensor:
    """Positions by falling magnitude, the first of equals first, without the outliers."""
    n = vector.numel()
    kept = round(density * n)
    outliers = min(round(gamma * n), n - kept)
    order = sorted(range(n), key=lambda i: (-abs(vector.flatten()[i].item()), i))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[outliers : outliers + kept]] = True
    return mask.view(vector.shape)


@pytest.mark.parametrize(
    ("name", "models", "parameters", "expected"),
    [
        # one outlier, two kept
        ("breadcrumbs", FIVE, {}, [0.0, -4.0, 3.0, 0.0, 0.0]),
        ("breadcrumbs", FIVE, {"gamma": 0}, [5.0, -4.0, 0.0, 0.0, 0.0]),
        ("breadcrumbs", FIVE, {"gamma": 0.01}, [5.0, -4.0, 0.0, 0.0, 0.0]),  # too small for an outlier: not zeroed
        ("breadcrumbs", FIVE, {"density": 0}, [0.0] * 5),
        ("breadcrumbs", FIVE, {"density": 1}, [5.0, -4.0, 3.0, -2.0, 1.0]),  # no room for an outlier
        ("breadcrumbs", FIVE, {"gamma": 1}, [0.0, 0.0, 0.0, -2.0, 1.0]),  # room for three
        ("breadcrumbs", FIVE, {"coefficient": 0.5, "scale": 3}, [0.0, -6.0, 4.5, 0.0, 0.0]),
        # k = round(0.5 * 5) = 2; outliers round(0.3 * 5) = 2 (1.5, half to even)
        ("breadcrumbs", FIVE, {"density": 0.5, "gamma": 0.3}, [0.0, 0.0, 3.0, -2.0, 0.0]),
        # (0, -4, 3, 0, 0) and (0, 0, -3, -4, 0)
        ("breadcrumbs", TWO, {}, [0.0, -4.0, 0.0, -4.0, 0.0]),
        ("breadcrumbs", TWO, {"coefficient": [1, 3], "normalize": True}, [0.0, -1.0, -1.5, -3.0, 0.0]),
        ("breadcrumbs_ties", TWO, {}, [0.0, -4.0, 3.0, -4.0, 0.0]),
        ("breadcrumbs_ties", TWO, {"coefficient": [1, 3], "normalize": True}, [0.0, -4.0, -3.0, -4.0, 0.0]),
        ("breadcrumbs_ties", TWO, {"coefficient": [1, 3]}, [0.0, -4.0, -9.0, -12.0, 0.0]),
        # a density each
        ("breadcrumbs", TWO, {"density": [0.2, 0.6]}, [0.0, -2.0 - 0.0, -3.0, -4.0, 0.0]),
        # equal magnitudes: the first counts as the outlier, the next two are kept
        ("breadcrumbs", of([2.0, -2.0, 2.0, -2.0, 2.0]), {}, [0.0, -2.0, 2.0, 0.0, 0.0]),
        ("breadcrumbs", of([0.0, 0.0]), {"density": 0.5}, [0.0, 0.0]),
    ],
)
def test_by_hand(name: str, models: Models, parameters: dict[str, Any], expected: list[float]) -> None:
    found = merge(name, models, **({"density": 0.4, "gamma": 0.2} | parameters)).tensors["w"].tolist()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_naive_truth(name: str, dtype: torch.dtype, density: float, gamma: float, normalize: bool) -> None:
    models = make_models(2, 2, dtype, {"model.layers.0.experts": (2, 3, 5), "big": (20, 25), "scalar": ()})
    rest: dict[str, Any] = {"normalize": normalize, "scale": 0.7}
    found = merge(name, models, density=density, gamma=gamma, coefficient=[1, 0.5], **rest)
    for key, base in models.base.items():
        vectors = [expert[key].float() - base.float() for expert in models.experts]
        masks = [naive_mask(vector, density, gamma) for vector in vectors]
        thin = [torch.where(mask, vector, 0.0) for mask, vector in zip(masks, vectors, strict=True)]
        expected = base.float() + combine(thin, [1.0, 0.5], elect=name == "breadcrumbs_ties", **rest)
        torch.testing.assert_close(found.tensors[key], expected, rtol=1e-6, atol=1e-6)
        kept = round(density * base.numel())
        assert found.reports[key] == {"coefficient": [1.0, 0.5], "kept": [kept, kept]}


@pytest.mark.parametrize("elements", [1, 37, 200])
def test_exact_among_ties_in_any_blocks(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 task vectors tie at both thresholds; which of them go is known element by element."""
    models = make_models(1, extra={"big": (40, 50)})
    base, expert = (model["big"].float() for model in (models.base, models.experts[0]))
    assert len((expert - base).abs().unique()) < 1500
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    found = merge("breadcrumbs", models, density=0.3, gamma=0.1).tensors["big"]
    mask = naive_mask(expert - base, 0.3, 0.1)
    assert int(mask.sum()) == 600
    assert torch.equal(found, torch.where(mask, base + (expert - base), base))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 1.5}, "method breadcrumbs: gamma"),
        ({"density": -0.1}, "method breadcrumbs, model ft0: density"),
        ({"rescale": "l1"}, "method breadcrumbs has no parameter 'rescale'"),
        ({"coefficient": 0, "normalize": True}, "coefficients sum to 0"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("breadcrumbs", **parameters)
