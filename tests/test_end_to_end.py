"""The main job on a real pair: FIM-TIES, streamed, against a naive whole-model implementation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import stories
import torch
from naive import FimResult, naive_fim, naive_fisher
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint

pytestmark = stories.needed

SETTINGS = {"dtype": "float32"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return stories.make_pair(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expert")
    stories.make_expert(folder)
    return folder


@pytest.fixture(scope="module")
def textbook(pair: tuple[Path, Path]) -> dict[str, Tensor]:
    """The Fisher of the whole model by ordinary autograd."""
    fisher, _ = naive_fisher(AutoModelForCausalLM.from_pretrained(pair[0], dtype="float32"))
    return fisher


@pytest.fixture(scope="module")
def measured(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Fisher of the same model, walked block by block, of all parameters."""
    folder = tmp_path_factory.mktemp("fisher") / "out"
    settings = streammerge.FisherSettings.model_validate({**SETTINGS, "all_parameters": True})
    streammerge.fisher(str(pair[0]), folder, settings, device="cpu")
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merge(
    pair: tuple[Path, Path], out: Path, *more: Path, fisher: Path | None = None, **parameters: Any
) -> dict[str, Any]:
    recipe = {
        "base": str(pair[0]),
        "models": [str(pair[1]), *map(str, more)],
        "method": "fim_ties",
        "parameters": parameters,
        "fisher": SETTINGS,
        "fisher_from": str(fisher) if fisher else None,
    }
    return streammerge.merge(recipe, out, device="cpu")


def agree(streamed: Mapping[str, Tensor], naive: FimResult) -> tuple[int, int, int]:
    """Elements in all, those that differ, and those that neither a trim threshold nor rounding explains.

    Both Fishers are float32, summed in another order, so an alpha differs by some 2e-8: enough to round one product in
    200 the other way. The naive merge differs as much from itself with a float64 Fisher.
    """
    total = differing = unexplained = 0
    for name, expected in naive.merged.items():
        differs = streamed[name] != expected
        total += expected.numel()
        differing += int(differs.sum())
        # alphas that differ in the last digits of a float64 may round a float32 the other way
        near = (streamed[name] - expected).abs() <= 2e-7 * expected.abs() + 1e-9
        for weight, threshold in zip(naive.weight.get(name, ()), naive.threshold.get(name, ()), strict=True):
            near |= (weight - threshold).abs() <= 1e-4 * threshold
        unexplained += int((differs & ~near).sum())
    return total, differing, unexplained


def test_the_fisher_is_the_textbook_one(measured: Path, textbook: dict[str, Tensor]) -> None:
    found = load(measured)
    assert set(found) == set(textbook)
    for name, expected in textbook.items():
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_record_holds_the_means(measured: Path, textbook: dict[str, Tensor]) -> None:
    record = json.loads((measured / "fisher.json").read_text())
    assert record["settings"] | {"dtype": "float32", "seed": 42, "samples": 8, "length": 64} == record["settings"]
    for block in record["blocks"]:
        matrices = [f for n, f in textbook.items() if n.startswith(f"model.layers.{block['block']}.") and f.dim() == 2]
        pooled = torch.cat([fisher.flatten() for fisher in matrices]).double()
        assert block["mean"] == pytest.approx(pooled.mean().item(), rel=1e-5)
        assert block["max"] == pytest.approx(pooled.max().item(), rel=1e-4)
    assert math.fsum(block["share"] for block in record["blocks"]) == pytest.approx(1)


def test_fim_ties_equals_the_naive_merge(pair: tuple[Path, Path], textbook: dict[str, Tensor], tmp_path: Path) -> None:
    result = merge(pair, tmp_path / "out")
    naive = naive_fim(load(pair[0]), [load(pair[1])], textbook)
    alphas = [row["alpha"] for row in result["blocks"]]
    assert alphas == pytest.approx(naive.alphas[0], abs=1e-4)
    assert {name: t["kept"] for name, t in result["tensors"].items() if "kept" in t} == naive.kept
    total, differing, unexplained = agree(load(tmp_path / "out"), naive)
    assert differing <= 0.01 * total
    assert unexplained == 0
    for name, ratio in naive.norm_ratio.items():
        assert result["tensors"][name]["norm_ratio"] == pytest.approx(ratio, abs=1e-5)


def test_from_the_same_fisher_the_merge_is_the_naive_one(
    pair: tuple[Path, Path], measured: Path, tmp_path: Path
) -> None:
    merge(pair, tmp_path / "out", fisher=measured)
    naive = naive_fim(load(pair[0]), [load(pair[1])], load(measured))
    total, differing, unexplained = agree(load(tmp_path / "out"), naive)
    assert differing <= 0.001 * total
    assert unexplained == 0


def test_a_tight_norm_tolerance_rescales_as_the_naive_merge_does(
    pair: tuple[Path, Path], textbook: dict[str, Tensor], tmp_path: Path
) -> None:
    result = merge(pair, tmp_path / "out", norm_tolerance=0.001)
    naive = naive_fim(load(pair[0]), [load(pair[1])], textbook, norm_tolerance=0.001)
    rescaled = {name: t["rescaled"] for name, t in result["tensors"].items() if "rescaled" in t}
    assert rescaled == naive.rescaled
    assert any(rescaled.values())
    total, differing, unexplained = agree(load(tmp_path / "out"), naive)
    assert differing <= 0.01 * total
    assert unexplained == 0


def test_two_experts_equal_the_naive_merge(
    pair: tuple[Path, Path], expert: Path, textbook: dict[str, Tensor], tmp_path: Path
) -> None:
    result = merge(pair, tmp_path / "out", expert)
    naive = naive_fim(load(pair[0]), [load(pair[1]), load(expert)], textbook)
    for index, model in enumerate((pair[1], expert)):
        alphas = [row["alpha"] for row in result["blocks"] if row["expert"] == str(model)]
        assert alphas == pytest.approx(naive.alphas[index], abs=1e-4)
    total, differing, unexplained = agree(load(tmp_path / "out"), naive)
    assert differing <= 0.01 * total
    assert unexplained == 0


def test_a_reused_fisher_gives_the_same_bytes(pair: tuple[Path, Path], measured: Path, tmp_path: Path) -> None:
    fresh = merge(pair, tmp_path / "fresh")
    reused = merge(pair, tmp_path / "reused", fisher=measured)
    assert fresh["shards"] == reused["shards"]
    assert [s["role"] for s in reused["sources"]] == ["base", "expert", "fisher"]


def test_the_merged_model_loads_and_tells_a_story(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(pair, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    prompt = torch.tensor([stories.encode("Once upon a time")])
    text = stories.decode(model.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist())
    assert text.startswith("Once upon a time")
    words = text.split()
    assert len(words) > 8
    assert len(set(words)) > 5
    assert stories.text_loss(model, "Once upon a time, there was a little girl named Lily.") < 0.5


def test_random_token_gradients_of_a_trained_model_are_bf16_safe(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A bfloat16 Fisher differs from the float32 one by its rounding alone."""
    streammerge.fisher(str(pair[0]), tmp_path / "rounded", device="cpu")
    settings = streammerge.FisherSettings.model_validate(SETTINGS)
    streammerge.fisher(str(pair[0]), tmp_path / "exact", settings, device="cpu")
    with Checkpoint.open(tmp_path / "exact", need_config=False) as exact:
        for name, rounded in load(tmp_path / "rounded").items():
            assert torch.equal(rounded, exact.tensor(name).bfloat16()), name
