"""ACM: the shares by hand and from their formula, and what is done with them."""

import math

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve

from streammerge.calibration.store import Calibrated, CalibrationRecord, CalibrationSettings
from streammerge.errors import RecipeError
from streammerge.methods.acm import place_of, shared_part
from streammerge.methods.api import TensorContext
from streammerge.recipe import make_recipe


def measured(*experts: dict[str, list[float]]) -> Calibrated:
    record = CalibrationRecord(
        version="0", settings=CalibrationSettings(), device="cpu", mutual_information=list(experts)
    )
    return Calibrated(record, lambda name: torch.empty(0))


def one_matrix(*task_vectors: list[float], nats: list[list[float]]) -> Models:
    name = "model.layers.0.mlp.up_proj.weight"
    experts = [{name: torch.tensor([vector])} for vector in task_vectors]
    base = {name: torch.zeros(1, len(task_vectors[0]))}
    return Models(base, experts, {}, [], measured(*({"embedding": [9.0], "0": each} for each in nats)))


def test_by_hand() -> None:
    """Two samples with I = 0 and log 3, theta 1: t = (1 / (1 + 3) + 1/2) / 2 = 3/8, and the coefficient is 5/8."""
    models = one_matrix([8.0, -16.0], nats=[[0.0, math.log(3)]])
    merged = merge("acm_ta", models, theta=1.0)
    torch.testing.assert_close(merged.tensors["model.layers.0.mlp.up_proj.weight"], torch.tensor([[5.0, -10.0]]))
    assert merged.reports["model.layers.0.mlp.up_proj.weight"]["coefficient"] == pytest.approx([0.625])


def test_by_hand_with_ties() -> None:
    """Coefficients 1/2 (one sample) and 5/8, halves kept: (8, 0) and (0, -16), then (4, 0) and (0, -10)."""
    models = one_matrix([8.0, 4.0], [8.0, -16.0], nats=[[2.0], [0.0, math.log(3)]])
    merged = merge("acm_ties", models, theta=1.0, density=0.5)
    torch.testing.assert_close(merged.tensors["model.layers.0.mlp.up_proj.weight"], torch.tensor([[4.0, -10.0]]))
    assert merged.reports["model.layers.0.mlp.up_proj.weight"]["kept"] == [1, 1]
    both = merge("acm_ties", models, theta=1.0, density=1.0)  # signs agree at the first: (4 + 5) / 2; -10 wins over 2
    torch.testing.assert_close(both.tensors["model.layers.0.mlp.up_proj.weight"], torch.tensor([[4.5, -10.0]]))


@pytest.mark.parametrize("nats", [[3.0], [0.0, 0.0], [1e-300, 5.0, 2.0], [0.0, 1e6]])
@pytest.mark.parametrize("theta", [0.0, 0.7, 10.0])
def test_the_share_is_the_mean_of_sigmoids(nats: list[float], theta: float) -> None:
    distances = torch.tensor(nats, dtype=torch.float64) - max(nats)
    share = shared_part(nats, theta)
    assert share == pytest.approx(torch.sigmoid(theta * distances).mean().item(), rel=1e-12)
    assert 0 < share <= 0.5


def test_even_samples_halve_and_uneven_ones_keep_more() -> None:
    assert shared_part([1.0, 1.0, 1.0], 0.7) == 0.5
    assert shared_part([1.0, 2.0, 9.0], 0.7) < shared_part([1.0, 2.0, 3.0], 0.7) < 0.5


@pytest.mark.parametrize(
    ("name", "block", "place"),
    [
        ("model.layers.7.mlp.up_proj.weight", 7, "7"),
        ("model.layers.7.input_layernorm.weight", 7, "7"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("model.norm.weight", None, "norm"),
        ("transformer.ln_f.bias", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("lm_head.bias", None, "head"),
    ],
)
def test_places(name: str, block: int | None, place: str) -> None:
    assert place_of(TensorContext(name, (2, 2), "F32", block)) == place


def test_every_place_has_its_own_coefficient() -> None:
    models = make_models(2)
    assert models.calibrated is not None
    nats = models.calibrated.record.mutual_information
    assert nats is not None
    reports = merge("acm_ta", models, coefficient=[1.0, 0.5]).reports
    for name, place in {
        "model.embed_tokens.weight": "embedding",
        "model.layers.1.mlp.down_proj.weight": "1",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    }.items():
        expected = [c * (1 - shared_part(of[place], 0.7)) for c, of in zip([1.0, 0.5], nats, strict=True)]
        assert reports[name]["coefficient"] == pytest.approx(expected)


def test_a_tied_head_takes_no_coefficient_of_its_own() -> None:
    """Where no head was measured, other tensors outside the blocks take the embedding's."""
    models = one_matrix([1.0], nats=[[0.0]])
    more = {"lm_head.weight": torch.ones(1, 1)}
    models = Models(
        models.base | more, [models.experts[0] | {"lm_head.weight": torch.zeros(1, 1)}], {}, [], models.calibrated
    )
    assert merge("acm_ta", models).reports["lm_head.weight"]["coefficient"] == [0.5]


def test_a_text_is_needed() -> None:
    import streammerge

    with pytest.raises(RecipeError, match="theta"):
        resolve("acm_ta", theta=-1)
    assert resolve("acm_ta").method.calibration == ("mutual_information",)
    assert make_recipe({"base": "a", "models": ["b"], "method": "acm-ta"}).method == "acm_ta"
    assert streammerge.METHODS["acm_ties"].summary
