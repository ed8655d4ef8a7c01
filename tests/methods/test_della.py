"""DELLA: by hand with given draws, and against a naive truth that sorts row by row."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.sparse_truth import combine, l1_factor, naive_draws, of, ones
from torch import Tensor

from streammerge.errors import RecipeError
from streammerge.methods import api, sparse
from streammerge.methods.della import keep_probabilities

METHODS = ["della", "della_linear"]


def naive_probabilities(vector: Tensor, density: float, epsilon: float) -> Tensor:
    """Entry by entry, in Python's floats: sorted by (magnitude, column)."""
    epsilon = min(epsilon, density, 1 - density)
    columns = vector.shape[-1] if vector.dim() else 1
    rows = []
    for row in vector.reshape(-1, columns).tolist():
        order = sorted(range(columns), key=lambda column: (abs(row[column]), column))
        share = {column: rank / (columns - 1) if columns > 1 else 0.5 for rank, column in enumerate(order)}
        rows.append([density - epsilon + 2 * epsilon * share[column] for column in range(columns)])
    return torch.tensor(rows).reshape(vector.shape)


@pytest.mark.parametrize(
    ("row", "density", "epsilon", "expected"),
    [
        ([1.0, -3.0, 2.0], 0.5, 0.25, [0.25, 0.75, 0.5]),
        ([1.0, -3.0, 2.0], 0.5, 0.0, [0.5, 0.5, 0.5]),
        ([2.0, -2.0, 2.0, 0.0], 0.5, 0.3, [0.4, 0.6, 0.8, 0.2]),  # equal magnitudes: by column
        ([0.0, -0.0], 0.5, 0.1, [0.4, 0.6]),
        ([1.0, 2.0], 0.9, 0.15, [0.8, 1.0]),  # the window is cut to what fits
        ([1.0, 2.0], 0.05, 0.15, [0.0, 0.1]),
        ([1.0, 2.0], 0.0, 0.15, [0.0, 0.0]),
        ([1.0, 2.0], 1.0, 0.15, [1.0, 1.0]),
        ([5.0], 0.3, 0.15, [0.3]),
    ],
)
def test_probabilities_by_hand(row: list[float], density: float, epsilon: float, expected: list[float]) -> None:
    found = keep_probabilities(torch.tensor([row]), density, epsilon)
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=1e-7)


def test_probabilities_are_per_row_and_average_to_the_density() -> None:
    vector = torch.randn(7, 101, generator=torch.Generator().manual_seed(0))
    vector[3] = 1.5
    found = keep_probabilities(vector, 0.6, 0.2)
    torch.testing.assert_close(found, naive_probabilities(vector, 0.6, 0.2), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.mean(1), torch.full((7,), 0.6), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        # keep probabilities (0.25, 0.75, 0.5) and (0.5, 0.75, 0.25), draws 0.3, 0.7, 0.1: (0, -3, 2), (2, 4, 1)
        ("della_linear", {"rescale": "off"}, [2.0, 1.0, 3.0]),
        # (0, -4, 4) + (4, 16/3, 4)
        ("della_linear", {}, [4.0, 4 / 3, 8.0]),
        # L1 norms 6 and 5; 7 and 7
        ("della_linear", {"rescale": "l1"}, [2.0, 4 - 3.6, 2.4 + 1]),
        # elected (+, +, +), the mean of what agrees
        ("della", {}, [4.0, 16 / 3, 4.0]),
        ("della", {"coefficient": [1, 0.5]}, [4.0, -4.0, 4.0]),  # -4 + 8/3 is negative
        ("della", {"normalize": False, "scale": 0.5}, [2.0, 8 / 3, 4.0]),
        ("della_linear", {"normalize": True}, [2.0, 2 / 3, 4.0]),
    ],
)
def test_by_hand(name: str, parameters: dict[str, Any], expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.tensor([[0.3, 0.7, 0.1]])
    monkeypatch.setattr(sparse, "uniform", lambda key, first, shape: draws)
    models = of([1.0, -3.0, 2.0], [2.0, 4.0, 1.0])
    if parameters.get("normalize") is None and name == "della_linear":
        assert merge(name, models, density=0.5, epsilon=0.25, **parameters).reports["w"]["kept"] == [2, 3]
    found = merge(name, models, density=0.5, epsilon=0.25, **parameters)
    assert found.tensors["w"].tolist() == pytest.approx(expected, rel=1e-6)


def naive_della(models: Models, density: float, epsilon: float, rescale: str, **rest: Any) -> dict[str, Tensor]:
    out = {}
    for key, base in models.base.items():
        vectors = []
        for i, expert in enumerate(models.experts):
            vector = expert[key].float() - base.float()
            keep = naive_probabilities(vector, density, epsilon)
            kept = torch.where(naive_draws(3, key, i, base.shape) < keep, vector, 0.0)
            if rescale == "density":
                kept = torch.where(kept != 0, kept / keep, 0.0)
            elif rescale == "l1":
                kept = kept * l1_factor(vector, kept)
            vectors.append(kept)
        out[key] = base.float() + combine(vectors, **rest)
    return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rescale", ["off", "density", "l1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_naive_truth(name: str, density: float, rescale: str, normalize: bool) -> None:
    """bfloat16 task vectors: many magnitudes tie, and vectors, stacks and scalars have rows of their own."""
    models = make_models(2, extra={"model.layers.0.experts": (2, 3, 5), "tall": (4, 1), "scalar": ()})
    rest: dict[str, Any] = {"normalize": normalize, "scale": 0.7}
    expected = naive_della(models, density, 0.2, rescale, coefficients=[1.0, 0.5], elect=name == "della", **rest)
    own: dict[str, Any] = {"density": density, "epsilon": 0.2, "rescale": rescale, "random_seed": 3}
    found = merge(name, models, coefficient=[1, 0.5], **own, **rest)
    for key, tensor in expected.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=2e-6, atol=2e-6)
        assert ("rescale" in found.reports[key]) is (rescale == "l1")


def test_kept_fraction_and_mean_by_rank() -> None:
    """All-equal magnitudes rank by column: a column's kept fraction is its probability, its mean is kept."""
    rows, columns, density, epsilon = 4000, 21, 0.6, 0.3
    found = merge("della_linear", ones(rows, columns), density=density, epsilon=epsilon)
    keep = density - epsilon + 2 * epsilon * torch.arange(columns, dtype=torch.float64) / (columns - 1)
    kept = (found.tensors["w"] != 0).double().mean(0)
    error = (keep * (1 - keep) / rows).sqrt()
    assert ((kept - keep).abs() < 5 * error).all()
    assert ((found.tensors["w"].double().mean(0) - 1).abs() < 5 * error / keep).all()
    spread = 5 * math.sqrt(density / (rows * columns))
    assert found.reports["w"]["kept"][0] / (rows * columns) == pytest.approx(density, abs=spread)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rescale", ["off", "density", "l1"])
def test_seeds(name: str, rescale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2)
    first, other = (merge(name, models, rescale=rescale, random_seed=seed) for seed in (0, 1))
    monkeypatch.setattr(api, "TILE_ELEMENTS", 7)
    again = merge(name, models, rescale=rescale, random_seed=0)
    for key, tensor in first.tensors.items():
        assert torch.equal(again.tensors[key], tensor) and not torch.equal(other.tensors[key], tensor)
        assert again.reports[key]["kept"] == first.reports[key]["kept"]


def test_a_non_finite_value_stays_where_it_is() -> None:
    vector = torch.arange(1.0, 101.0)
    vector[17] = float("nan")
    found = merge("della", Models({"w": torch.zeros(100)}, [{"w": vector}], {}), density=0.5).tensors["w"]
    assert found.isnan().nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epsilon": 0.6}, "method della: epsilon"),
        ({"epsilon": -0.1}, "method della: epsilon"),
        ({"density": -0.1}, "method della, model ft0: density"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("della", **parameters)
