"""The nonlinearity score, against whole models in memory and cases with a known answer."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import numpy
import pytest
import torch
from diagnose.conftest import KINDS, Family, change
from diagnose.truth import calls, first, whole
from safetensors.torch import load_file
from tiny_models import WEIGHTS
from torch import Tensor

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.diagnose import nonlinearity as nonlinearity_module
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.probes import random_tokens

IDS = random_tokens(97, 6, 24, 5)
TOKENS = {"samples": 6, "length": 24, "seed": 5, "nonlinearity": True}
COLUMNS = ["nonlinearity", "relative_merging_error", "change"]


def score(base: Path, tuned: Path, **settings: Any) -> dict[str, Any]:
    return streammerge.diagnose(str(tuned), str(base), {**TOKENS, **settings}, device="cpu")


def truth(base: Path, tuned: Path, between: Path, alpha: float, dtype: torch.dtype) -> list[list[float]]:
    """NL, relative merging error and change of every block, from three whole models in memory."""
    models = [whole(folder, dtype) for folder in (base, tuned, between)]
    rows = []
    for block, (args, kwargs, _) in enumerate(calls(models[0], IDS)):
        with torch.no_grad():
            f0, f1, f = (first(model.model.layers[block](*args, **kwargs)).double() for model in models)
        found = []
        for x0, x1, x in zip(f0, f1, f, strict=True):
            bend = (x - (x0 + alpha * (x1 - x0))).norm()
            average = (1 - alpha) * x0 + alpha * x1
            found.append([bend / (x1 - x0).norm(), bend / average.norm(), (x1 - x0).norm() / x0.norm()])
        rows.append(torch.tensor(found).mean(0).tolist())
    return rows


def interpolated(folder: Path, base: Path, tuned: Path, alpha: float) -> Path:
    """A whole model between the two, in the base's dtype."""
    other = load_file(tuned / WEIGHTS)
    copytree(base, folder)
    return change(folder, lambda name, v: ((1 - alpha) * v.float() + alpha * other[name].float()).to(v.dtype))


def rows_of(result: dict[str, Any]) -> list[list[float]]:
    return [[row[column] for column in COLUMNS] for row in result["blocks"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.5, 0.25])
def test_scores_are_those_of_whole_models(family: Family, tmp_path: Path, kind: str, alpha: float) -> None:
    _, base, tuned, _ = family(kind)
    between = interpolated(tmp_path / "between", base, tuned, alpha)
    expected = truth(base, tuned, between, alpha, torch.float64)
    result = score(base, tuned, alpha=alpha, compute_dtype="float64")
    for found, row in zip(rows_of(result), expected, strict=True):
        assert found == pytest.approx(row, rel=1e-6)  # the weights between are rounded to float32
    columns = numpy.array(expected)
    assert result["pearson"] == pytest.approx(numpy.corrcoef(columns[:, 0], columns[:, 1])[0, 1], abs=1e-5)
    assert result["mean"] == pytest.approx(dict(zip(COLUMNS, columns.mean(0), strict=True)), rel=1e-6)
    assert (result["correlated_blocks"], result["notes"]) == ([0, 1, 2], [])
    assert all(row[0] > 1e-3 for row in expected)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_models_in_bfloat16_run_in_float32_with_weights_rounded_as_in_a_merge(
    family: Family, tmp_path: Path, kind: str
) -> None:
    _, *originals = family(kind)
    base, tuned = (
        change(Path(copytree(model, tmp_path / model.name)), lambda _, value: value.bfloat16())
        for model in originals[:2]
    )
    assert score(base, tuned)["compute_dtype"] == "float32"
    found = rows_of(score(base, tuned, compute_dtype="float64"))
    between = interpolated(tmp_path / "between", base, tuned, 0.5)
    for row, expected in zip(found, truth(base, tuned, between, 0.5, torch.float64), strict=True):
        assert row == pytest.approx(expected, rel=1e-10)
    wide = change(Path(copytree(base, tmp_path / "wide")), lambda _, value: value.float())
    unrounded = interpolated(tmp_path / "unrounded", wide, tuned, 0.5)
    for row, expected in zip(found, truth(base, tuned, unrounded, 0.5, torch.float64), strict=True):
        assert row[:2] != pytest.approx(expected[:2], rel=1e-5)


def test_a_fine_tune_stored_in_another_dtype(family: Family, tmp_path: Path) -> None:
    _, base, tuned, _ = family("qwen2")
    half = change(Path(copytree(tuned, tmp_path / "half")), lambda _, value: value.bfloat16())
    expected = truth(base, half, interpolated(tmp_path / "between", base, half, 0.5), 0.5, torch.float32)
    for found, row in zip(rows_of(score(base, half)), expected, strict=True):
        assert found == pytest.approx(row, rel=1e-3)


def test_models_in_float8(family: Family, tmp_path: Path) -> None:
    """Neither transformers nor torch's promotion knows float8; the ends are exact all the same."""
    base, tuned = (
        change(
            Path(copytree(model, tmp_path / model.name)), lambda _, v: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v
        )
        for model in family("llama")[1:3]
    )
    upcast = [
        change(Path(copytree(model, tmp_path / f"{model.name}32")), lambda _, value: value.float())
        for model in (base, tuned)
    ]
    found, same = score(base, tuned, alpha=1, compute_dtype="float32"), score(*upcast, alpha=1)
    assert found["blocks"] == same["blocks"]
    assert all(row["nonlinearity"] == 0 < row["change"] for row in found["blocks"])
    assert score(base, tuned, compute_dtype="float32")["mean"]["nonlinearity"] > 0


@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_at_both_ends_the_score_is_zero(family: Family, kind: str, alpha: float) -> None:
    _, base, tuned, _ = family(kind)
    result = score(base, tuned, alpha=alpha)
    assert [row[:2] for row in rows_of(result)] == [[0, 0]] * 3
    assert all(row["change"] > 0.01 for row in result["blocks"])
    assert result["pearson"] is None
    assert result["notes"] == ["the correlation is undefined: one of the two is constant"]


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_equal_models_have_no_score_and_no_correlation(family: Family, alpha: float) -> None:
    model = family("qwen2")[1]
    result = score(model, model, alpha=alpha)
    assert rows_of(result) == [[0, 0, 0]] * 3
    assert (result["pearson"], result["correlated_blocks"]) == (None, [])
    assert result["notes"] == [
        "3 of 3 blocks have the same output in both models; the correlation is without them",
        "the correlation is undefined: 0 block(s) to correlate, which takes two",
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_block_that_is_linear_in_what_changed_has_a_score_of_zero(family: Family, tmp_path: Path, kind: str) -> None:
    """Only down_proj changes, by values whose middle float32 holds; then only o_proj, which feeds the MLP."""
    model = family(kind)[1]
    base = change(Path(copytree(model, tmp_path / "base")), lambda _, value: value.bfloat16().float())

    def tuned(leaf: str) -> Path:
        generator = torch.Generator().manual_seed(1)

        def moved(name: str, value: Tensor) -> Tensor:
            noise = (0.2 * torch.randn(value.shape, generator=generator)).bfloat16().float()
            return (value + noise).bfloat16().float() if name.endswith(leaf) else value

        return change(Path(copytree(base, tmp_path / leaf)), moved)

    linear = score(base, tuned("down_proj.weight"), compute_dtype="float64")
    bent = score(base, tuned("o_proj.weight"), compute_dtype="float64")
    assert all(row["nonlinearity"] < 1e-13 < 0.01 < row["change"] for row in linear["blocks"])
    assert all(row["nonlinearity"] > 1e-2 for row in bent["blocks"])


def test_blocks_that_did_not_change_are_not_in_the_correlation(family: Family, tmp_path: Path) -> None:
    _, base, tuned, _ = family("qwen2")
    other = load_file(tuned / WEIGHTS)
    part = change(
        Path(copytree(base, tmp_path / "part")),
        lambda name, v: v if name.startswith("model.layers.1.") else other[name],
    )
    result, all_changed = score(base, part), score(base, tuned)
    assert result["blocks"][1] == {"block": 1, **dict.fromkeys(COLUMNS, 0.0)}
    assert [result["blocks"][n] for n in (0, 2)] == [all_changed["blocks"][n] for n in (0, 2)]
    assert result["correlated_blocks"] == [0, 2]
    assert result["pearson"] == pytest.approx(1) or result["pearson"] == pytest.approx(-1)  # of two points
    assert result["notes"] == ["1 of 3 blocks have the same output in both models; the correlation is without them"]


def test_neither_threads_nor_pieces_nor_a_second_run_change_the_numbers(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, tuned, _ = family("mixtral")
    once, before = score(base, tuned), torch.get_num_threads()
    monkeypatch.setattr(nonlinearity_module, "_PIECE", 7)
    try:
        torch.set_num_threads(3)
        assert score(base, tuned) == once
    finally:
        torch.set_num_threads(before)


def test_one_block_is_in_the_model_at_a_time(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in a block when another is installed would be a second one."""
    _, base, tuned, _ = family("llama")
    plain, seen = BlockModel.install, []

    def install(self: BlockModel, index: int, *args: Any) -> Any:
        loaded = [p for block in range(3) for p in self.parameters(block).values() if not p.is_meta]
        seen.append((self.base.id, index, len(loaded)))
        return plain(self, index, *args)

    monkeypatch.setattr(BlockModel, "install", install)
    score(base, tuned)
    assert seen == [(str(base), index, 0) for index in range(3) for _ in range(3)]


def test_blocks_made_of_other_tensors_are_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, tuned, _ = family("llama")
    plain = BlockModel.__init__

    def shorter(self: BlockModel, model: Checkpoint, *args: Any) -> None:
        plain(self, model, *args)
        if model.id == str(tuned):
            self.layouts = self.layouts[:1]

    monkeypatch.setattr(BlockModel, "__init__", shorter)
    with pytest.raises(streammerge.errors.CheckpointError, match=f"model {tuned}: its decoder blocks compute with"):
        score(base, tuned)
