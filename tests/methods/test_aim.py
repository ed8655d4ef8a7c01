"""AIM: by hand, and around every method against its formula."""

from dataclasses import replace

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve

from streammerge.calibration.store import Calibrated, CalibrationRecord, CalibrationSettings, entry
from streammerge.errors import RecipeError
from streammerge.methods import METHODS


def channels(name: str, magnitudes: list[float]) -> Calibrated:
    stored = {entry("channels", 0, name): torch.tensor(magnitudes)}
    record = CalibrationRecord(
        version="0", settings=CalibrationSettings(), device="cpu", tensors=dict.fromkeys(stored, "memory")
    )
    return Calibrated(record, stored.__getitem__)


def test_by_hand() -> None:
    """Magnitudes 4, 2, 0 and omega 0.25: what is left of the changes is 1/4, 5/8 and all."""
    models = Models({"w": torch.ones(1, 3)}, [{"w": torch.tensor([[9.0, 9.0, 9.0]])}], {}, [], channels("w", [4, 2, 0]))
    merged = merge("task_arithmetic", models, aim=0.25, coefficient=1.0)
    assert torch.equal(merged.tensors["w"], torch.tensor([[3.0, 6.0, 9.0]]))
    assert merged.reports["w"] == {"coefficient": [1.0], "aim": 0.625}


@pytest.mark.parametrize("name", METHODS)
def test_draws_every_method_back(name: str) -> None:
    models = make_models(max(METHODS[name].fewest_experts, 1))
    assert models.calibrated is not None
    plain, drawn = merge(name, models), merge(name, models, aim=0.4)
    for key, tensor in plain.tensors.items():
        found = models.calibrated.of(key).get("channels")
        base = models.base[key].float()
        if not found or key not in plain.reports:
            assert torch.equal(drawn.tensors[key], tensor), key
            continue
        left = 1 - 0.6 * (found[0] / found[0].max()).double()
        expected = base.double() + (tensor.double() - base.double()) * left
        torch.testing.assert_close(drawn.tensors[key].double(), expected, rtol=1e-6, atol=1e-6)
        assert drawn.reports[key]["aim"] == pytest.approx(left.mean().item(), rel=1e-6)
    assert drawn.blocks == plain.blocks


def test_an_omega_of_one_changes_nothing_but_rounding() -> None:
    models = make_models(2)
    for key, tensor in merge("ties", models, aim=1.0).tensors.items():
        torch.testing.assert_close(tensor, merge("ties", models).tensors[key], rtol=1e-6, atol=1e-6)


def test_silent_channels() -> None:
    """Where nothing went through a module its tensors stay as they are merged."""
    models = make_models(1)
    silent = replace(models, calibrated=channels("model.norm.weight", [0.0] * 6))
    assert torch.equal(
        merge("linear", silent, aim=0.0).tensors["model.norm.weight"],
        merge("linear", models).tensors["model.norm.weight"],
    )


def test_what_it_passes_on() -> None:
    fim = resolve("fim_ties", aim=0.4).method
    assert fim.needs_fisher
    assert fim.calibration == ("channels",)
    assert resolve("acm_ta", aim=0.4).method.calibration == ("mutual_information", "channels")
    with pytest.raises(RecipeError, match="aim"):
        resolve("linear", aim=1.5)
