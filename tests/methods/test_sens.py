"""Sens-Merging: by hand, against the formula in torch, and what is left of it at the ends of its parameters."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, Tensors, make_models, merge, resolve
from torch import Tensor

from streammerge.calibration.store import Calibrated, CalibrationRecord, CalibrationSettings, Sensitivity
from streammerge.errors import RecipeError
from streammerge.methods.sens import block_scales, model_shares

ONE, TWO, BIAS = (f"model.layers.{end}" for end in ("0.mlp.up_proj.weight", "1.mlp.up_proj.weight", "1.q_proj.bias"))
NORM = "model.norm.weight"


def calibrated(blocks: list[dict[int, float]], distances: list[list[float]]) -> Calibrated:
    record = CalibrationRecord(
        version="0",
        settings=CalibrationSettings(),
        device="cpu",
        sensitivity=Sensitivity(blocks=blocks, distances=distances),
    )
    return Calibrated(record, lambda name: torch.empty(0))


def values(one: float, two: float, bias: float, norm: float) -> Tensors:
    return {
        ONE: torch.tensor([[one]]),
        TWO: torch.tensor([[two]]),
        BIAS: torch.tensor([bias]),
        NORM: torch.tensor([norm]),
    }


# alpha = (0.6, 0.8) and (0, 1); tau = (1, 3) / 4
MEASURED = calibrated([{0: 3.0, 1: 4.0}, {0: 0.0, 1: 5.0}], [[0.0, 1.0], [3.0, 0.0]])
PAIR = Models(values(1.0, 2.0, 0.0, 3.0), [values(2.0, 4.0, 1.0, 4.0)], {}, [], MEASURED)


@pytest.mark.parametrize(
    ("tau", "first", "second"),
    [
        # block 0: e^(0.6 * 0.25 / 0.5) = e^0.3 against e^0; block 1: e^(0.8 * 0.25 / 0.5) = e^0.4 against e^1.5
        ("distance", 2 / (1 + math.exp(0.3)), 2 / (1 + math.exp(0.4 - 1.5))),
        # tau = (3, 1) / 4: e^(0.6 * 0.75 / 0.5) = e^0.9 against e^0; e^(0.8 * 0.75 / 0.5) = e^1.2 against e^0.5
        ("similarity", 2 / (1 + math.exp(0.9)), 2 / (1 + math.exp(1.2 - 0.5))),
    ],
)
def test_by_hand(tau: str, first: float, second: float) -> None:
    merged = merge("sens", PAIR, temperature=0.5, tau=tau, coefficient=0.5)
    mean = (first + second) / 2
    expected = {ONE: 1 + 0.5 * first, TWO: 2 + 0.5 * second * 2, BIAS: 0.5 * second, NORM: 3 + 0.5 * mean}
    assert {name: tensor.item() for name, tensor in merged.tensors.items()} == pytest.approx(expected, rel=1e-6)
    coefficients = {ONE: first / 2, TWO: second / 2, BIAS: second / 2, NORM: mean / 2}
    assert {name: entry["coefficient"] for name, entry in merged.reports.items()} == {
        name: [pytest.approx(coefficient)] for name, coefficient in coefficients.items()
    }


def formula(blocks: Tensor, distances: Tensor, temperature: float, similarity: bool) -> Tensor:
    """K sigma, [models, blocks], from S [models, blocks] and g [models, models]."""
    alpha = blocks / blocks.norm(dim=1, keepdim=True)
    tau = distances.sum(1) / distances.sum()
    if similarity:
        tau = (1 - tau) / (len(tau) - 1)
    return len(tau) * torch.softmax(alpha * tau[:, None] / temperature, 0)


@pytest.mark.parametrize("temperature", [2.0, 0.05])
@pytest.mark.parametrize("tau", ["distance", "similarity"])
def test_three_models_by_the_formula(temperature: float, tau: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    distances = torch.rand(4, 4, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    measured = Sensitivity(blocks=[dict(enumerate(row.tolist())) for row in blocks], distances=distances.tolist())
    expected = formula(blocks, distances, temperature, tau == "similarity")
    found = torch.tensor([list(of_model.values()) for of_model in block_scales(measured, temperature, tau)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sum(0), torch.full((5,), 4.0))


def test_at_a_high_temperature_it_is_task_arithmetic() -> None:
    models = make_models(2)
    merged = merge("sens", models, temperature=1e12, coefficient=[0.5, 0.25])
    expected = merge("task_arithmetic", models, coefficient=[0.5, 0.25])
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_at_a_low_temperature_one_model_takes_it_all() -> None:
    measured = Sensitivity(blocks=[{0: 3.0, 1: 4.0}, {0: 0.0, 1: 5.0}], distances=[[0.0, 1.0], [3.0, 0.0]])
    assert block_scales(measured, 1e-320, "distance") == [{0: 2.0, 1: 0.0}, {0: 0.0, 1: 2.0}]


def test_where_nothing_tells_the_models_apart() -> None:
    assert model_shares([[0.0] * 4] * 4, "distance") == model_shares([[0.0] * 4] * 4, "similarity") == [0.25] * 4
    no_gradient = Sensitivity(blocks=[{0: 0.0}, {0: 0.0}], distances=[[0.0, 1.0], [3.0, 0.0]])
    assert block_scales(no_gradient, 2.0, "distance") == [{0: 1.0}, {0: 1.0}]


def test_the_range_that_the_documentation_gives() -> None:
    """Two models, one text: each block's scale of the fine-tuned one, whatever its sensitivity."""
    extremes = Sensitivity(blocks=[{0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}], distances=[[0.0, 2.0], [2.0, 0.0]])
    (_, scales) = block_scales(extremes, 2.0, "distance")
    assert (round(scales[0], 3), round(scales[1], 3)) == (0.876, 1.124)


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": -1}, {"tau": "near"}])
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"method sens.*{next(iter(parameters))}"):
        resolve("sens", **parameters)
