"""The plan against what then happens: sizes, passes, notes; and that it reads headers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_checkpoints import make_pair
from tiny_models import Models

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.source import LocalFile
from streammerge.errors import RecipeError
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.probes import random_tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base, ft = make_pair("tiny", tmp_path_factory.mktemp("pair"), ft_tie=False, tie=True, say=lambda line: None)
    return str(base), str(ft)


def job(pair: tuple[str, str], method: str, **values: Any) -> dict[str, Any]:
    return {"base": pair[0], "models": [pair[1]], "method": method, **values}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "fim_ties"])
def test_the_summary_says_what_the_merge_does(pair: tuple[str, str], tmp_path: Path, method: str) -> None:
    recipe = job(pair, method, max_shard_bytes="60KB")
    with streammerge.plan(recipe) as plan, Checkpoint.open(pair[0]) as base:
        summary = plan.summary()
        infos = list(base.tensors.values())
    result = streammerge.merge(recipe, tmp_path / "out", device="cpu")
    assert summary["bytes_to_write"] == sum(shard["bytes"] for shard in result["shards"].values())
    assert summary["shards"] == len(result["shards"]) > 1
    assert summary["tensors"] == len(infos) == len(result["tensors"])
    assert summary["parameters"] == sum(info.numel for info in infos)
    assert summary["merged"] == sum("coefficient" in tensor for tensor in result["tensors"].values())
    assert summary["merged"] + summary["copied"] == summary["tensors"]
    assert summary["notes"] == result["notes"]
    assert len(summary["notes"]) == 1
    assert "lm_head.weight" in summary["notes"][0]
    weights = sum(info.nbytes for info in infos)
    matrices = sum(info.nbytes for info in infos if ".layers." in info.name and len(info.shape) > 1)
    fisher = method == "fim_ties"
    assert summary["bytes_to_read"] == 2 * weights + (2 * matrices + matrices if fisher else 0)
    assert (summary["fisher_placement"] is not None) is fisher
    assert bool(summary["fisher_bytes_to_read"]) is fisher


def test_where_the_fisher_pass_runs(pair: tuple[str, str], tmp_path: Path) -> None:
    with streammerge.plan(job(pair, "fim_ties")) as plan, Checkpoint.open(pair[0]) as base:
        summary = plan.summary(FisherRun("cpu"))
        infos = list(base.tensors.values())
        (tmp_path / "map.json").write_text(json.dumps({"": "disk", "model.layers.1": "cpu"}))
        stay = plan.summary(FisherRun("cpu", device_map=str(tmp_path / "map.json")))["fisher_placement"]
    placement = summary["fisher_placement"]
    blocks = {number: [i for i in infos if f".layers.{number}." in i.name] for number in range(placement["blocks"])}
    sizes = [sum(info.nbytes for info in block) for block in blocks.values()]
    embedding = next(info for info in infos if info.name == "model.embed_tokens.weight")
    tokens = len(random_tokens(embedding.shape[0], 8, 64, 42).unique())
    rows = tokens * embedding.nbytes // embedding.shape[0]  # as embeddings; all of them once as the head, tied to them
    outside = sum(info.nbytes for info in infos) - sum(sizes) + rows
    assert len(sizes) > 1 and min(sizes) > 0
    assert (placement["device"], placement["stay"], placement["device_bytes"]) == ("cpu", 0, 0)
    expected = outside + 2 * sum(sizes[:-1]) + sizes[-1]
    assert placement["bytes_to_read"] == summary["fisher_bytes_to_read"] == pytest.approx(expected, rel=0.005)
    assert summary["peak_host_bytes"] == max(placement["host_bytes"], summary["peak_merge_bytes"])
    assert placement["host_bytes"] > 2 * max(sizes)
    assert stay["stay"] == 1
    assert stay["bytes_to_read"] == expected - sizes[1], "the tokens were drawn for it"
    assert stay["host_bytes"] == placement["host_bytes"] + sizes[1]


def test_what_the_fisher_is_measured_on(pair: tuple[str, str], saved_fisher: Path, saved_models: Models) -> None:
    with streammerge.plan(job(pair, "fim_ties")) as plan:
        assert plan.summary()["fisher"] == "measured on random tokens"
    with streammerge.plan(
        job((str(saved_models.base), str(saved_models.ft)), "fim_ties", fisher_from=str(saved_fisher))
    ) as plan:
        summary = plan.summary(FisherRun("bogus"))  # there is no pass
    assert (summary["fisher"], summary["fisher_placement"]) == (str(saved_fisher), None)
    assert summary["fisher_bytes_to_read"] == 0
    assert summary["peak_host_bytes"] == summary["peak_merge_bytes"]


def test_passes_are_those_of_the_method(pair: tuple[str, str]) -> None:
    passes = {"task_arithmetic": 1, "linear": 1, "ties": 4, "fim_ta": 1, "fim_ties": 5}
    for method, count in passes.items():
        with streammerge.plan(job(pair, method)) as plan:
            assert plan.summary()["passes"] == count, method


def test_only_headers_are_read(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    furthest: dict[str, int] = {}
    plain = LocalFile.read_into

    def watched(self: LocalFile, buffer: memoryview, offset: int) -> None:
        furthest[self.where] = max(furthest.get(self.where, 0), offset + len(buffer))
        plain(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", watched)
    with streammerge.plan(job(pair, "fim_ties")) as plan:
        headers = {min(info.start for info in model.tensors.values()) for model in (plan.base, *plan.experts)}
        plan.summary()
    assert set(furthest.values()) == headers
    assert len(furthest) == 2


def test_auto_density_follows_the_size_of_the_base(pair: tuple[str, str]) -> None:
    with streammerge.plan(job(pair, "fim_ties")) as plan:
        assert plan.summary()["models"][0]["density"] == 0.2


@pytest.mark.parametrize("changes", [{"fisher_from": "somewhere"}, {"fisher": {"samples": 4}}])
def test_a_fisher_that_nobody_reads_is_refused(pair: tuple[str, str], changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="method ties with these parameters uses no Fisher"):
        streammerge.plan(job(pair, "ties", **changes))


def test_scores_from_norms_alone_need_no_fisher(pair: tuple[str, str], tmp_path: Path) -> None:
    recipe = job(pair, "fim_ties", parameters={"importance": "norm", "trim": "magnitude"})
    with streammerge.plan(recipe) as plan:
        assert plan.summary()["fisher"] == "none"
    result = streammerge.merge(recipe, tmp_path / "out")
    assert all(row["fisher_mean"] is None for row in result["blocks"])
    assert {row["alpha"] for row in result["blocks"]} >= {0.5}
