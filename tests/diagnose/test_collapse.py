"""Collapse, against whole models in memory and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diagnose.conftest import KINDS, SIZE, Family, average, change
from diagnose.truth import angle, block_vector, outputs, rank, variance
from fisher.models import saved
from tiny_models import edit
from torch import Tensor

import streammerge
from streammerge.diagnose import collapse as collapse_module
from streammerge.fisher.probes import random_tokens

IDS = random_tokens(97, 6, 24, 5)
TOKENS = {"samples": 6, "length": 24, "seed": 5}


def collapse(models: list[Path], **settings: Any) -> dict[str, Any]:
    model, *sources = map(str, models)
    return streammerge.diagnose(model, sources, {**TOKENS, **settings}, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_activations_are_those_of_whole_models(family: Family, kind: str, dtype: str, tolerance: float) -> None:
    models = family(kind)
    truth = [outputs(model, IDS, getattr(torch, dtype)) for model in models]
    for of in ("eigenvalues", "singular"):
        result = collapse(models, compute_dtype=dtype, rank=of)
        assert [row["block"] for row in result["blocks"]] == [0, 1, 2]
        for row in result["blocks"]:
            hidden = [of_model[row["block"]] for of_model in truth]
            variances, ranks = [variance(h) for h in hidden], [rank(h, of == "singular") for h in hidden]
            found = [row["activation_variance"], *row["source_variances"]]
            assert found == pytest.approx(variances, rel=tolerance)
            assert [row["effective_rank"], *row["source_ranks"]] == pytest.approx(ranks, rel=tolerance)
            assert row["variance_ratio"] == pytest.approx(3 * variances[0] / sum(variances[1:]), rel=tolerance)
            assert row["rank_ratio"] == pytest.approx(3 * ranks[0] / sum(ranks[1:]), rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_files(family: Family, kind: str) -> None:
    result, models = collapse(family(kind)), family(kind)
    total = 0.0
    for row in result["blocks"]:
        merged, *sources = (block_vector(model, row["block"]) for model in models)
        norms, angles = [float(v.norm()) for v in (merged, *sources)], [angle(merged, source) for source in sources]
        assert [row["norm"], *row["source_norms"]] == pytest.approx(norms, rel=1e-12)
        assert row["norm_shrinkage"] == pytest.approx(3 * norms[0] / sum(norms[1:]), rel=1e-12)
        assert row["source_angles"] == pytest.approx(angles, rel=1e-12)
        assert row["mean_squared_angle"] == pytest.approx(sum(a * a for a in angles) / 3, rel=1e-12)
        total += sum(a * a for a in angles) / 3
    assert result["proxy_objective"] == pytest.approx(total, rel=1e-12)
    for column, value in result["mean"].items():
        assert value == pytest.approx(sum(row[column] for row in result["blocks"]) / 3, rel=1e-12)


def test_mixed_dtypes_are_read_as_they_are_stored(family: Family, tmp_path: Path) -> None:
    """The merged model in bfloat16, its sources in float32; all run in bfloat16, the first one's."""
    merged, *sources = family("qwen2")
    rounded = change(Path(copytree(merged, tmp_path / "merged")), lambda _, value: value.bfloat16())
    result = collapse([rounded, *sources])
    assert result["compute_dtype"] == "bfloat16"
    for row in result["blocks"]:
        vectors = [block_vector(model, row["block"]) for model in (rounded, *sources)]
        assert row["norm"] == pytest.approx(float(vectors[0].norm()), rel=1e-12)
        assert row["source_angles"] == pytest.approx([angle(vectors[0], v) for v in vectors[1:]], rel=1e-9)


def random_sources(folder: Path, count: int) -> list[Path]:
    """Models that share nothing: independent normal weights, norms included."""

    def fresh(seed: int) -> Callable[[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return lambda _, value: 0.1 * torch.randn(value.shape, generator=generator)

    return [change(saved(folder / f"source{n}", "llama", **SIZE), fresh(n)) for n in range(count)]


@pytest.mark.parametrize("count", [2, 5])
def test_the_mean_of_sources_that_share_nothing_shrinks_by_the_root_of_their_number(tmp_path: Path, count: int) -> None:
    """|mean| / |source| = 1 / sqrt(N), and the angle to each has the cosine 1 / sqrt(N); Karcher keeps the norm."""
    sources = random_sources(tmp_path, count)
    mean = average(sources)
    merged = change(Path(copytree(sources[0], tmp_path / "merged")), lambda name, _: mean[name])
    result = collapse([merged, *sources])
    assert result["mean"]["norm_shrinkage"] == pytest.approx(1 / math.sqrt(count), rel=0.02)
    for row in result["blocks"]:
        assert row["source_angles"] == pytest.approx([math.acos(1 / math.sqrt(count))] * count, rel=0.03)
    base, *others = map(str, sources)
    streammerge.merge({"base": base, "models": others, "method": "karcher"}, tmp_path / "karcher")
    kept = collapse([tmp_path / "karcher", *sources])
    assert kept["mean"]["norm_shrinkage"] == pytest.approx(1, rel=0.01)
    assert kept["mean"]["variance_ratio"] > result["mean"]["variance_ratio"]


def test_a_model_beside_itself(family: Family) -> None:
    model = family("qwen2")[1]
    result = collapse([model, model])
    for row in result["blocks"]:
        assert (row["variance_ratio"], row["rank_ratio"], row["norm_shrinkage"]) == (1, 1, 1)
        assert (row["source_angles"], row["mean_squared_angle"]) == ([0], 0)
    assert (result["proxy_objective"], result["notes"]) == (0, [])


def test_small_angles_keep_their_digits(family: Family, tmp_path: Path) -> None:
    """One element of a block moves by one unit in its last place: a cosine would round that angle to zero."""
    model = family("qwen2")[1]
    other = Path(copytree(model, tmp_path / "other"))
    name = "model.layers.1.mlp.up_proj.weight"

    def nudge(state: dict[str, Tensor]) -> None:
        element = state[name][0, 0]
        state[name][0, 0] = torch.nextafter(element, torch.tensor(math.inf))

    edit(other, nudge)
    found = [row["source_angles"][0] for row in collapse([other, model])["blocks"]]
    expected = angle(block_vector(other, 1), block_vector(model, 1))
    assert found[0] == found[2] == 0 < expected < 1e-8
    assert found[1] == pytest.approx(expected, rel=1e-6)


def test_a_scaled_copy_has_the_ratio_of_its_scale_and_no_angle(family: Family, tmp_path: Path) -> None:
    model = family("llama")[1]
    half = change(Path(copytree(model, tmp_path / "half")), lambda _, value: value / 2)
    result = collapse([half, model])
    assert result["mean"]["norm_shrinkage"] == 0.5
    assert result["proxy_objective"] < 1e-14


def test_neither_threads_nor_pieces_change_the_numbers(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    models, before = family("qwen2"), torch.get_num_threads()
    one = collapse(models)
    try:
        torch.set_num_threads(3)
        assert collapse(models) == one
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(collapse_module, "_PIECE", 7)
    for row, whole in zip(collapse(models)["blocks"], one["blocks"], strict=True):
        assert row["source_norms"] == pytest.approx(whole["source_norms"], rel=1e-13)
        assert row["source_angles"] == pytest.approx(whole["source_angles"], rel=1e-13)


def test_blocks_of_zeros_are_no_division_by_zero(family: Family, tmp_path: Path) -> None:
    """Over a norm of zero nothing is defined, and the angle is a right one."""
    model = family("llama")[1]
    zeros = change(
        Path(copytree(model, tmp_path / "zeros")), lambda name, v: torch.zeros_like(v) if ".layers." in name else v
    )
    result = collapse([model, zeros])
    assert [row["norm_shrinkage"] for row in result["blocks"]] == [None] * 3
    assert result["mean"]["norm_shrinkage"] is None
    assert result["proxy_objective"] == pytest.approx(3 * (math.pi / 2) ** 2)
    assert collapse([zeros, zeros])["mean"]["norm_shrinkage"] is None
