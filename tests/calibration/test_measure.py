"""What is measured block by block, against whole live models with plain hooks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration.conftest import Family
from fisher.models import ARCHITECTURES, MIXTURES
from torch import Tensor, nn

from streammerge.calibration import calibrate, check
from streammerge.calibration import measure as measuring
from streammerge.calibration.mutual_information import as_labels, mutual_information
from streammerge.calibration.store import CALIBRATION_FILE, Calibrated, Measurement, entry
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.placement import FisherRun

Make = Callable[..., Family]
CPU = FisherRun("cpu")
DENSE = [kind for kind in ARCHITECTURES if kind not in MIXTURES]


def measured(made: Family, folder: Path, *measurements: Measurement) -> Calibrated:
    models = made.open()
    try:
        return calibrate(models, made.settings, measurements, folder, CPU)
    finally:
        for model in models:
            model.close()


def inputs_of(model: Any, ids: Tensor, kinds: Callable[[nn.Module], bool]) -> dict[str, Tensor]:
    """What goes into each module of a kind in one run over all samples: name -> [samples, ..., channels]."""
    found: dict[str, Tensor] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].detach()

        return before

    for name, module in model.named_modules():
        if kinds(module):
            handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def outputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What every module gives."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def after(_: nn.Module, inputs: object, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach() if not _odd(output) else None

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    first = inputs_of(model, ids, lambda module: module is model.model.layers[0])
    return {**found, "logits": logits, "first": first["model.layers.0"]}


def _odd(output: Any) -> bool:
    return not isinstance(output[0] if isinstance(output, tuple) else output, Tensor)


def naive_information(a: Tensor, b: Tensor) -> float:
    """sum p log(p / (p p)) over pairs of values, in Python."""
    x, y = (values.bfloat16().flatten().tolist() for values in (a, b))
    n, left, right = len(x), Counter(x), Counter(y)
    together = Counter(zip(x, y, strict=True))
    return math.fsum(c / n * math.log(c * n / (left[p] * right[q])) for (p, q), c in together.items())


# --- mutual information -----------------------------------------------------------------------------------------------


def test_information_by_hand() -> None:
    """Two fair coins: equal, 1 bit; independent, none; and three of four pairs alike."""
    coin = torch.tensor([1.0, 1.0, 2.0, 2.0])
    other = torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert mutual_information(as_labels(coin), as_labels(coin)) == pytest.approx(math.log(2))
    assert mutual_information(as_labels(coin), as_labels(other)) == 0.0
    skewed = torch.tensor([1.0, 1.0, 1.0, 2.0])
    expected = math.log(4) - (2 * 2 * math.log(2) + 3 * math.log(3) - 2 * math.log(2)) / 4
    assert mutual_information(as_labels(coin), as_labels(skewed)) == pytest.approx(expected)
    assert mutual_information(as_labels(torch.tensor([0.0, -0.0])), as_labels(torch.tensor([5.0, 6.0]))) == 0.0
    assert mutual_information(as_labels(torch.empty(0)), as_labels(torch.empty(0))) == 0.0


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_information_of_any_labels(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.calibration.mutual_information._PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 4.0):
        a = (scale * torch.randn(300, generator=generator)).round()
        b = a + (torch.randn(300, generator=generator)).round()
        assert mutual_information(as_labels(a), as_labels(b)) == pytest.approx(naive_information(a, b), rel=1e-9)


def test_labels_are_the_values_in_bfloat16() -> None:
    values = torch.tensor([1.0, 1.001, 1.01, -0.0, 0.0, 3e38])
    assert len(np.unique(as_labels(values))) == 4
    assert as_labels(values)[0] == as_labels(values)[1] != as_labels(values)[2]


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_information_equals_that_of_the_live_models(family: Make, tmp_path: Path, kind: str, tied: bool) -> None:
    made = family(kind, tied)
    found = measured(made, tmp_path / "out", "mutual_information").record.mutual_information
    assert found is not None
    outputs = [outputs_of(model, made.ids) for model in made.models]
    names = {"embedding": "first", "norm": "model.norm"}  # gemma scales its embedding, in or behind the module
    names |= {str(block): f"model.layers.{block}.mlp.down_proj" for block in range(2)}
    if not tied:
        names["head"] = "logits" if kind == "gemma2" else "lm_head"  # with the soft cap, as the model gives them
    for expert, of_expert in enumerate(found, 1):
        assert of_expert.keys() == names.keys()
        for place, nats in of_expert.items():
            pairs = zip(outputs[0][names[place]], outputs[expert][names[place]], strict=True)
            expected = [naive_information(a, b) for a, b in pairs]
            assert nats == pytest.approx(expected, rel=0.02, abs=0.02), place  # a value may round to its neighbour


def test_information_of_a_mixture_is_of_the_blocks_output(family: Make, tmp_path: Path) -> None:
    made = family("mixtral")
    found = measured(made, tmp_path / "out", "mutual_information").record.mutual_information
    assert found is not None
    outputs = [outputs_of(model, made.ids) for model in made.models[:2]]
    for block in range(2):
        pairs = zip(*(out[f"model.layers.{block}"] for out in outputs), strict=True)
        assert found[0][str(block)] == pytest.approx([naive_information(a, b) for a, b in pairs], rel=0.02, abs=0.02)


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_channels_equal_those_of_the_live_model(family: Make, tmp_path: Path, kind: str, tied: bool) -> None:
    made = family(kind, tied)
    calibrated = measured(made, tmp_path / "out", "channels")
    seen = inputs_of(made.models[0], made.ids, lambda m: hasattr(m, "weight") and not isinstance(m, nn.Embedding))
    expected = {
        f"{name}.weight": x.double().abs().flatten(0, -2).mean(0)
        for name, x in seen.items()
        if name != "lm_head" or not tied
    }
    found = {name.removeprefix("channels.0."): calibrated.read(name) for name in calibrated.record.tensors}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", MIXTURES)
def test_channels_of_experts_are_of_the_tokens_that_reach_them(family: Make, tmp_path: Path, kind: str) -> None:
    made = family(kind)
    calibrated = measured(made, tmp_path / "out", "channels")
    mlp = "block_sparse_moe" if kind == "mixtral" else "mlp"
    router = inputs_of(made.models[0], made.ids, lambda m: m is made.models[0].model.layers[0].mlp.gate)
    hidden = next(iter(router.values())).flatten(0, -2)
    weight = made.models[0].model.layers[0].mlp.gate.weight.detach()
    chosen = (hidden @ weight.T).topk(2).indices
    gate = "w1" if kind == "mixtral" else "gate_proj"
    for expert in range(4):
        mine = hidden[(chosen == expert).any(1)]
        name = f"model.layers.0.{mlp}.experts.{expert}.{gate}.weight"
        found = calibrated.of(name).get("channels")
        if len(mine):
            assert found is not None
            torch.testing.assert_close(found[0].double(), mine.double().abs().mean(0), rtol=1e-5, atol=1e-6)
        else:
            assert found is None


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DENSE, "qwen3_moe"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_inputs_equal_those_of_the_live_models(family: Make, tmp_path: Path, kind: str, rows: int) -> None:
    made = family(kind, False, rows=rows)
    calibrated = measured(made, tmp_path / "out", "inputs")
    tokens = made.ids.numel()
    kept = min(rows, tokens)
    chosen = [i * tokens // kept for i in range(kept)]
    for number, model in enumerate(made.models):
        seen = inputs_of(model, made.ids, lambda m: isinstance(m, nn.Linear))
        assert {f"{name}.weight" for name in seen} <= {
            key.split(".", 2)[2] for key in calibrated.record.tensors if key.startswith(f"inputs.{number}.")
        }
        for name, x in seen.items():
            found = calibrated.read(entry("inputs", number, f"{name}.weight"))
            torch.testing.assert_close(found, x.flatten(0, -2)[chosen], rtol=1e-4, atol=1e-5)


def test_every_model_on_its_own_text(family: Make, tmp_path: Path) -> None:
    texts = []
    for number, words in enumerate(("somefirsttext", "thesecondone", "andathird")):
        path = tmp_path / f"text{number}"
        path.write_text(words * 30)
        texts.append(str(path))
    made = family(text=texts)
    together = measured(made, tmp_path / "out", "inputs")
    for number, text in enumerate(texts):
        alone = measured(family(text=[text]), tmp_path / f"alone{number}", "inputs")
        names = [name for name in alone.record.tensors if name.startswith(f"inputs.{number}.")]
        assert names
        for name in names:
            assert torch.equal(alone.read(name), together.read(name))
    assert len(set(together.record.tokens)) == 3


# --- the walk ---------------------------------------------------------------------------------------------------------


def test_all_measurements_in_one_walk_are_those_of_each(family: Make, tmp_path: Path) -> None:
    made = family("llama", False)
    together = measured(made, tmp_path / "all", "mutual_information", "channels", "inputs")
    for measurement in ("mutual_information", "channels", "inputs"):
        alone = measured(made, tmp_path / measurement, measurement)
        assert alone.record.mutual_information in (None, together.record.mutual_information)
        for name in alone.record.tensors:
            assert torch.equal(alone.read(name), together.read(name))


def test_channels_alone_walk_the_base_alone(family: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    plain = measuring.Lockstep
    monkeypatch.setattr(measuring, "Lockstep", lambda models, *rest: walked.append(len(models)) or plain(models, *rest))
    measured(family(), tmp_path / "channels", "channels")
    measured(family(), tmp_path / "both", "channels", "inputs")
    assert walked == [1, 3]


def test_a_finished_calibration_is_opened_and_an_unfinished_one_done_again(family: Make, tmp_path: Path) -> None:
    made = family()
    first = measured(made, tmp_path / "out", "channels").record
    (tmp_path / "text.txt").unlink()  # nobody looks at it again
    assert measured(made, tmp_path / "out", "channels").record == first
    (tmp_path / "out" / CALIBRATION_FILE).unlink()
    with pytest.raises(RecipeError, match="No such file"):
        measured(made, tmp_path / "out", "channels")


def test_bfloat16_stays_close(family: Make, tmp_path: Path) -> None:
    made = family("qwen2", False, torch.bfloat16)
    calibrated = measured(made, tmp_path / "out", "channels")
    seen = inputs_of(made.models[0], made.ids, lambda m: isinstance(m, nn.Linear))
    for name, x in seen.items():
        found = calibrated.of(f"{name}.weight")["channels"][0]
        assert float((found - x.abs().flatten(0, -2).mean(0)).norm() / found.norm()) < 0.02


def test_non_finite_weights_and_activations_are_named(family: Make, tmp_path: Path) -> None:
    made = family("llama")
    made.models[1].model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    made.models[1].save_pretrained(made.folders[1])
    with pytest.raises(CheckpointError, match=r"one, file .*'model.layers.1.mlp.down_proj.weight' holds 1 non-finite"):
        measured(made, tmp_path / "out", "mutual_information")
    made.models[1].model.layers[1].mlp.down_proj.weight.data[0, 0] = 3e38
    made.models[1].save_pretrained(made.folders[1])
    with pytest.raises(CheckpointError, match="one: the output of decoder block 1 is not finite"):
        measured(made, tmp_path / "out", "mutual_information")
    assert not (tmp_path / "out" / CALIBRATION_FILE).exists()


def test_refused_before_anything_is_written(family: Make, tmp_path: Path) -> None:
    made = family()
    models = made.open()
    with pytest.raises(RecipeError, match="--device nowhere"):
        check(models, made.settings, FisherRun("nowhere"))
    (made.folders[0] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="it brings no tokenizer, which --calibration needs"):
        check(models, made.settings, CPU)
    assert not (tmp_path / "out").exists()
