"""Tables, plan text, manifest and model card."""

import math
from typing import Any

import pytest
from tiny_models import Models

import streammerge
from streammerge.fisher.store import BlockFisher, FisherRecord
from streammerge.report import block_rows, fisher_rows, manifest, plan_text, resolved_recipe, table


def test_table() -> None:
    text = table(["block", "n"], [["0", "1"], ["1 long", "234"]])
    assert text == "block     n\n------  ---\n0         1\n1 long  234"
    assert table(["a", "b"], []) == "a  b\n-  -"


def entry(block: int, **values: Any) -> dict[str, Any]:
    return {"block": block, "fisher_mean": 0.5, "task_vector_mean_square": 1e-9, "score": -2.0, "alpha": 0.75} | values


def result(blocks: list[dict[str, Any]], **tensors: dict[str, Any]) -> dict[str, Any]:
    facts = {"block": 0, "shape": [4, 5], "numel": 20}
    models = [{"model": name} for name in ("b", "c")]
    return {
        "blocks": blocks,
        "tensors": {name: facts | values for name, values in tensors.items()},
        "recipe": {"models": models},
    }


def test_block_rows_pool_the_tensors_of_a_block() -> None:
    tensors = {
        "m": {"kept": 5, "rescaled": True},
        "n": {"kept": 10, "rescaled": False, "numel": 40, "shape": [8, 5]},
        "norm": {"shape": [5], "numel": 5},
        "elsewhere": {"block": 1, "kept": 20, "rescaled": True},
        "embedding": {"block": None},
    }
    header, (row,) = block_rows(result([entry(0)], **tensors))
    assert dict(zip(header, row, strict=True)) == {
        "block": "0",
        "Fisher mean": "5.000e-01",
        "task vector^2": "1.000e-09",
        "score": "-2.000",
        "alpha": "0.7500",
        "kept": "25.0%",
        "rescaled": "1 of 2",
    }


def test_block_rows_of_several_models_of_single_tensors_and_without_numbers() -> None:
    blocks = [
        entry(0, expert="b", tensor="m"),
        entry(0, expert="c", tensor="n", fisher_mean=None, score=None),
        entry(0, expert="c", tensor="k"),
    ]
    tensors = {"m": {"kept": [20, 0]}, "n": {"kept": [0, 10]}, "k": {}}
    _, rows = block_rows(result(blocks, **tensors))
    assert [row[0] for row in rows] == ["b: 0 m", "c: 0 n", "c: 0 k"]
    assert [row[5] for row in rows] == ["100.0%", "50.0%", "-"]
    assert (rows[1][1], rows[1][3]) == ("-", "-")


def record(*means: float) -> FisherRecord:
    blocks = [BlockFisher(block=i, mean=mean, max=mean, share=1 / len(means)) for i, mean in enumerate(means)]
    values = {"version": "0", "base": {"id": "a", "revision": None, "fingerprint": ""}, "settings": {}}
    rest = {"loss": 1.0, "device": "cpu", "tensors": {}, "files": []}
    return FisherRecord.model_validate(values | rest | {"blocks": [block.model_dump() for block in blocks]})


@pytest.mark.parametrize(
    ("means", "bars", "ratio"),
    [
        ((1e-4, 1e-2, 1e-3), [1, 20, 10], 100.0),
        ((1e-4, 0.0), [20, 0], None),
        ((0.5, 0.5), [20, 20], 1.0),
        ((0.0,), [0], None),
        ((), [], None),
    ],
)
def test_fisher_rows(means: tuple[float, ...], bars: list[int], ratio: float | None) -> None:
    header, rows = fisher_rows(record(*means))
    assert [row[-1].count("#") for row in rows] == pytest.approx(bars, abs=1)
    assert all(len(row) == len(header) and len(row[-1]) == 20 for row in rows)
    found = record(*means).ratio
    assert found == ratio or (found is not None and ratio is not None and math.isclose(found, ratio))


def test_plan_text_has_a_line_for_everything(saved_models: Models) -> None:
    recipe = {"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": "linear"}
    with streammerge.plan(recipe) as job:
        summary = job.summary()
    text = plan_text(summary | {"notes": ["one", "two"]})
    keys = "base model method Fisher tensors parameters to workers host note"
    assert {line.split()[0] for line in text.splitlines()} == {*keys.split(), "passes"}
    assert text.endswith("note           one\nnote           two")
    assert "Fisher pass" not in text
    assert ", and 5 MB for the Fisher" in plan_text(summary | {"fisher_bytes_to_read": 5 * 10**6})


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (
            {"device": "cpu", "stay": 0, "blocks": 28, "device_bytes": 0, "host_bytes": 3 << 30},
            "on cpu, 0 of 28 blocks stay, 28 are read twice; 3072 MiB of RAM",
        ),
        (
            {"device": "cuda:1", "stay": 25, "blocks": 28, "device_bytes": 20 << 30, "host_bytes": 2 << 30},
            "on cuda:1, 25 of 28 blocks stay, 3 are read twice; 20.0 GiB there and 2048 MiB of RAM",
        ),
    ],
)
def test_plan_text_says_where_the_fisher_pass_runs(saved_models: Models, placement: dict[str, Any], text: str) -> None:
    with streammerge.plan({"base": str(saved_models.base), "models": [str(saved_models.ft)]}) as job:
        summary = job.summary() | {"fisher_placement": placement}
    assert f"\nFisher pass    {text}" in plan_text(summary)


def test_a_resolved_recipe_is_a_recipe(saved_models: Models) -> None:
    recipe = {"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": "ties"}
    with streammerge.plan(recipe) as job:
        values = resolved_recipe(job)
    assert values["parameters"] and values["models"][0]["parameters"]
    with streammerge.plan(values) as job:
        assert resolved_recipe(job) == values


SHARDS = {"model.safetensors": {"bytes": 1, "sha256": "0", "tensors": {}}}


def test_one_shard_has_no_index_among_the_files(saved_models: Models) -> None:
    recipe = {"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": "ties"}
    for size, index in (("1GB", False), ("8KB", True)):
        with streammerge.plan(recipe | {"max_shard_bytes": size}) as job:
            shards = {shard.file: SHARDS["model.safetensors"] for shard in job.shards}
            files = manifest(job, job.method, [], {}, shards)["files"]
        assert set(files) == {*shards, *(["model.safetensors.index.json"] if index else [])}
