"""DARE: by hand with given draws, and against a naive truth with its own generator."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.sparse_truth import combine, l1_factor, naive_draws, of, ones
from torch import Tensor

from streammerge.errors import RecipeError
from streammerge.methods import api, sparse

METHODS = ["dare_linear", "dare_ties"]
DRAWS = torch.tensor([0.1, 0.49, 0.5, 0.9])


def merged(name: str, models: Models, **parameters: Any) -> list[float]:
    return merge(name, models, **parameters).tensors["w"].tolist()


@pytest.fixture
def given_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model gets the draws 0.1, 0.49, 0.5, 0.9: density 0.5 keeps the first two entries."""
    monkeypatch.setattr(sparse, "uniform", lambda key, first, shape: DRAWS.view(shape))


ONE = of([1.0, -2.0, 4.0, 8.0], base=1.0)
TWO = of([1.0, -2.0, 4.0, 8.0], [-3.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "models", "parameters", "expected"),
    [
        # (1, -2, 0, 0) / 0.5, on top of the base
        ("dare_linear", ONE, {}, [3.0, -3.0, 1.0, 1.0]),
        ("dare_linear", ONE, {"rescale": "off"}, [2.0, -1.0, 1.0, 1.0]),
        # L1 norms 15 and 3: (1, -2, 0, 0) * 5
        ("dare_linear", ONE, {"rescale": "l1"}, [6.0, -9.0, 1.0, 1.0]),
        ("dare_linear", ONE, {"coefficient": 0.5, "scale": 3}, [4.0, -5.0, 1.0, 1.0]),
        # (2, -4) + 0.5 * (-6, 2)
        ("dare_linear", TWO, {"coefficient": [1, 0.5]}, [-1.0, -3.0, 0.0, 0.0]),
        ("dare_linear", TWO, {"coefficient": [1, 0.25], "normalize": True}, [0.4, -2.8, 0.0, 0.0]),
        # elected (-, -): of (2, -4) and (-3, 1) what agrees
        ("dare_ties", TWO, {"coefficient": [1, 0.5]}, [-3.0, -4.0, 0.0, 0.0]),
        ("dare_ties", TWO, {"coefficient": [1, 0.5], "normalize": True}, [-6.0, -4.0, 0.0, 0.0]),
        # a density each: the second is kept whole and not rescaled
        ("dare_linear", TWO, {"density": [0.5, 1]}, [-1.0, -3.0, 1.0, 0.0]),
        ("dare_linear", TWO, {"density": 0}, [0.0, 0.0, 0.0, 0.0]),
        ("dare_linear", TWO, {"density": 0, "rescale": "l1"}, [0.0, 0.0, 0.0, 0.0]),
        ("dare_linear", TWO, {"density": 1, "rescale": "l1"}, [-2.0, -1.0, 5.0, 8.0]),
    ],
)
@pytest.mark.usefixtures("given_draws")
def test_by_hand(name: str, models: Models, parameters: dict[str, Any], expected: list[float]) -> None:
    assert merged(name, models, **({"density": 0.5} | parameters)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("given_draws")
def test_reports() -> None:
    entry = {"coefficient": [1.0, 0.5], "kept": [2, 2]}
    common: dict[str, Any] = {"density": 0.5, "coefficient": [1, 0.5]}
    assert merge("dare_linear", TWO, rescale="off", **common).reports["w"] == entry
    assert merge("dare_linear", TWO, **common).reports["w"] == {**entry, "rescale": [2.0, 2.0]}
    assert merge("dare_linear", TWO, rescale="l1", **common).reports["w"] == {**entry, "rescale": [5.0, 1.25]}


def naive_dare(models: Models, name: str, density: float, rescale: str, **rest: Any) -> dict[str, Tensor]:
    out = {}
    for key, base in models.base.items():
        vectors = []
        for i, expert in enumerate(models.experts):
            vector = expert[key].float() - base.float()
            kept = torch.where(naive_draws(3, key, i, base.shape) < density, vector, 0.0)
            if rescale == "density" and density:
                kept = kept / density
            elif rescale == "l1":
                kept = kept * l1_factor(vector, kept)
            vectors.append(kept)
        out[key] = base.float() + combine(vectors, elect=name == "dare_ties", **rest)
    return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rescale", ["off", "density", "l1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_naive_truth(name: str, density: float, rescale: str, normalize: bool) -> None:
    models = make_models(2, extra={"model.layers.0.experts": (2, 3, 5), "one": (1, 1), "scalar": ()})
    rest: dict[str, Any] = {"normalize": normalize, "scale": 0.7}
    expected = naive_dare(models, name, density, rescale, coefficients=[1.0, 0.5], **rest)
    found = merge(name, models, density=density, rescale=rescale, coefficient=[1, 0.5], random_seed=3, **rest)
    for key, tensor in expected.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=2e-6, atol=2e-6)
        kept = [int((naive_draws(3, key, i, tensor.shape) < density).sum()) for i in range(2)]
        assert found.reports[key]["kept"] == kept


@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 0.99])
def test_kept_fraction_and_mean(density: float) -> None:
    rows, columns = 300, 1000
    n = rows * columns
    found = merge("dare_linear", ones(rows, columns, 2), density=density, coefficient=[1, 1])
    error = 5 * math.sqrt(density * (1 - density) / n)
    for kept in found.reports["w"]["kept"]:
        assert kept / n == pytest.approx(density, abs=error)
    assert found.tensors["w"].double().mean().item() == pytest.approx(2, abs=2 * error / density)
    both = (found.tensors["w"] > 1.5 / density).double().mean().item()
    assert both == pytest.approx(density**2, abs=5 * density / math.sqrt(n)), "the models' draws are independent"


@pytest.mark.parametrize("name", METHODS)
def test_the_l1_norm_is_restored(name: str) -> None:
    models = make_models(1, dtype=torch.float32, extra={"big": (40, 50)})
    found = merge(name, models, density=0.4, rescale="l1")
    before = (models.experts[0]["big"] - models.base["big"]).abs().sum()
    torch.testing.assert_close((found.tensors["big"] - models.base["big"]).abs().sum(), before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_seeds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2)
    first, other = (merge(name, models, random_seed=seed) for seed in (0, 1))
    monkeypatch.setattr(api, "TILE_ELEMENTS", 7)
    again = merge(name, models, random_seed=0)
    for key, tensor in first.tensors.items():
        assert torch.equal(again.tensors[key], tensor) and not torch.equal(other.tensors[key], tensor)
        assert again.reports[key]["kept"] == first.reports[key]["kept"]


@pytest.mark.parametrize("rescale", ["off", "density", "l1"])
def test_a_non_finite_value_stays_where_it_is(rescale: str) -> None:
    vector = torch.arange(1.0, 101.0)
    vector[17] = float("nan")
    models = Models({"w": torch.zeros(100)}, [{"w": vector}], {})
    found = merge("dare_linear", models, density=0.5, rescale=rescale).tensors["w"]
    assert found.isnan().nonzero().flatten().tolist() == [17]


def test_zeros_keep_their_factor() -> None:
    assert merge("dare_linear", of([0.0, 0.0]), rescale="l1").reports["w"]["rescale"] == [1.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rescale": "L2"}, "method dare_linear: rescale"),
        ({"density": 1.5}, "method dare_linear, model ft0: density"),
        ({"random_seed": -1}, "method dare_linear: random_seed"),
        ({"coefficient": 0, "normalize": True}, "coefficients sum to 0"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("dare_linear", **parameters)
