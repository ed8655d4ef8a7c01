"""What the commands print: the streams, the tables, and the contract of `--json`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import HEAD, MATRIX, WEIGHTS, Models, Run, content, put, tensors

import streammerge
from streammerge import cli

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands
Merged = Callable[..., Path]


def test_without_a_command_merge_is_meant(models: Models, tmp_path: Path, run: Run) -> None:
    arguments = ("--base", models.base, "--ft", models.ft, "-m", "ties", "-q", "--out")
    assert run(*arguments, tmp_path / "a").code == run("merge", *arguments, tmp_path / "b").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("name", ["fim-ties", "fim_ties", "task-arithmetic", "task_arithmetic"])
def test_hyphens_and_underscores(models: Models, run: Run, name: str) -> None:
    result = run("plan", "--base", models.base, "--ft", models.ft, "--method", name, "--json")
    assert json.loads(result.out)["method"] == name.replace("-", "_")


def test_standard_output_has_the_result_and_standard_error_nothing(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    result = run(*pair, "--out", tmp_path / "out", "--fisher", saved_fisher)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0].split() == ["block", "Fisher", "mean", "task", "vector^2", "score", "alpha", "kept", "rescaled"]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[-1].startswith("24 tensors merged, 2 copied from the base: ")
    assert lines[-1].endswith(f" in {tmp_path / 'out'}")
    result = run("verify", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path / 'out'}: ok: 26 tensors, ")
    result = run("fisher", "--base", models.base, "--out", tmp_path / "f", "--fisher-samples", "1")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"Fisher of {models.base} in {tmp_path / 'f'}"


def test_notes_are_part_of_the_result(models: Models, tmp_path: Path, run: Run) -> None:
    put(models.ft, HEAD, torch.ones(48, 16))
    result = run("--base", models.base, "--ft", models.ft, "-m", "ties", "--out", tmp_path / "out")
    assert f"note: {models.ft}: tensor '{HEAD}' was left out: the base ties its head" in result.out
    assert "was left out" in (tmp_path / "out" / "README.md").read_text()


def test_dry_run_is_plan_and_writes_nothing(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.commands.merge.available_memory", lambda: 1 << 33)
    monkeypatch.setattr("streammerge.checkpoints.disk_space.free_bytes", lambda folder: 1 << 33)
    pair = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "--threads", "1")
    before = content(tmp_path)
    for more in ((), ("--json",), ("--out", tmp_path / "out")):
        planned = run("plan", *pair, *more)
        assert (planned.code, planned.err) == (0, "")
        assert run(*pair, "--dry-run", *more) == planned
        assert run("merge", *pair, "--dry-run", *more) == planned
    assert content(tmp_path) == before


def test_what_plan_tells(models: Models, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    summary = json.loads(run("plan", *pair, "--json", "--density", "0.5").out)
    assert summary["base"] == str(models.base)
    assert summary["models"] == [{"model": str(models.ft), "coefficient": 1.0, "density": 0.5}]
    assert (summary["tensors"], summary["merged"], summary["copied"]) == (26, 24, 2)
    assert summary["parameters"] == sum(value.numel() for value in tensors(models.base).values())
    assert summary["bytes_to_write"] == (models.base / WEIGHTS).stat().st_size
    assert summary["bytes_to_read"] > 0 and summary["fisher_bytes_to_read"] > 0
    assert summary["passes"] >= 3
    assert summary["peak_host_bytes"] >= summary["peak_merge_bytes"] > 0 < summary["fisher_placement"]["host_bytes"]
    text = run("plan", *pair).out
    words = ("tensors", "parameters", "to read", "to write", "passes", "host memory", "Fisher pass")
    assert [word for word in words if f"\n{word} " not in text] == []
    copies = json.loads(run("plan", *pair, "--json", "-m", "task_arithmetic").out)
    assert (copies["fisher_placement"], copies["fisher"], copies["fisher_bytes_to_read"]) == (None, "none", 0)


def test_plan_tells_of_an_unfinished_run(models: Models, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out" / ".streammerge").mkdir(parents=True)
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--out", tmp_path / "out")
    assert "holds an unfinished run: the same merge goes on where it stopped" in run(*pair).out
    assert "holds an unfinished run: --overwrite starts it anew" in run(*pair, "--overwrite").out


def test_plan_tells_where_the_fisher_pass_runs(models: Models, tmp_path: Path, run: Run) -> None:
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--device", "cpu")
    line = r"\nFisher pass    on cpu, {} of 2 blocks stay, {} are read twice; \d{{3}} MiB of RAM\n"
    assert re.search(line.format(0, 2), run(*pair).out)
    (tmp_path / "map.json").write_text(json.dumps({"model": "disk", "model.layers.0": "cpu"}))
    result = run(*pair, "--device-map", tmp_path / "map.json")
    assert re.search(line.format(1, 1), result.out), result
    assert "Fisher pass" not in run(*pair, "-m", "ties").out


def test_the_blocks_that_stay_change_nothing(models: Models, tmp_path: Path, run: Run) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"": "disk", "model.layers.0": "cpu"}))
    fisher = ("fisher", "--base", models.base, "--samples", "1", "--device", "cpu", "-q", "--out")
    assert run(*fisher, tmp_path / "a").code == 0
    assert run(*fisher, tmp_path / "b", "--device-map", tmp_path / "map.json").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_merge_json_is_the_manifest(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    result = run(*pair, "--out", tmp_path / "out", "--fisher", saved_fisher, "--max-shard-size", "8KB", "--json")
    manifest = json.loads(result.out)
    assert manifest == json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert manifest["version"] == streammerge.__version__
    assert manifest["recipe"]["parameters"]["gate_factor"] == 0.7
    assert manifest["recipe"]["models"] == [
        {"model": str(models.ft), "parameters": {"coefficient": 1.0, "density": 0.2}}
    ]
    assert [source["role"] for source in manifest["sources"]] == ["base", "expert", "fisher"]
    assert all({"role", "id", "revision"} <= source.keys() for source in manifest["sources"])
    keys = {"block", "fisher_mean", "task_vector_mean_square", "score", "alpha"}
    assert [block["block"] for block in manifest["blocks"]] == [0, 1]
    assert all(block.keys() == keys for block in manifest["blocks"])
    assert manifest["tensors"].keys() == tensors(models.base).keys()
    assert {"coefficient", "kept", "numel", "norm_ratio", "rescaled"} <= manifest["tensors"][MATRIX].keys()
    assert all(entry["numel"] > 0 for entry in manifest["tensors"].values())
    assert len(manifest["shards"]) > 1
    for file, entry in manifest["shards"].items():
        assert entry.keys() == {"bytes", "sha256"}
        assert entry["bytes"] == (tmp_path / "out" / file).stat().st_size
        assert len(entry["sha256"]) == 64


def test_verify_json(merged: Merged, run: Run) -> None:
    out = merged()
    result = run("verify", out, "--json")
    report = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    size = sum(value.nbytes for value in tensors(out).values())
    assert report == {"ok": True, "problems": [], "tensors": 26, "bytes": size, "nonfinite": [], "notes": []}
    (out / "LICENSE").unlink()
    result = run("verify", out, "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"], report["problems"]) == (1, False, ["file LICENSE is missing"])
    assert run("verify", out).out == f"{out}: file LICENSE is missing\n"


def test_fisher_json(models: Models, tmp_path: Path, run: Run) -> None:
    result = run("fisher", "--base", models.base, "--out", tmp_path / "f", "--fisher-samples", "1", "--json")
    record = json.loads(result.out)
    assert record == json.loads((tmp_path / "f" / "fisher.json").read_text())
    assert record["base"]["id"] == str(models.base) and record["settings"]["samples"] == 1
    assert [block["block"] for block in record["blocks"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mrege", "--base", "a"), "there is no command 'mrege': did you mean 'merge'?"),
        (("evl", "merged"), "there is no command 'evl': did you mean 'eval'?"),
        (("xyz",), f"there is no command 'xyz': known: {', '.join(COMMANDS)}"),
        (("recipe.yaml",), "recipe recipe.yaml: No such file or directory"),
        (("mine/recipe",), "recipe mine/recipe: No such file or directory"),
    ],
)
def test_a_word_that_is_no_command(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """Nor a file, which would be a recipe."""
    monkeypatch.chdir(tmp_path)
    is_command = message.startswith("there is no")
    assert run(*arguments) == (2 if is_command else 1, "", f"streammerge: error: {message}\n")


def test_a_recipe_may_have_the_name_of_no_command(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrege").write_text("base: nowhere\n")
    result = run("mrege", "--out", "out")
    assert result.code == 1 and "no command" not in result.err and "models" in result.err


def test_a_dry_run_checks_the_output_folder(models: Models, run: Run) -> None:
    result = run("merge", "--base", str(models.base), "--ft", str(models.ft), "--out", str(models.base), "--dry-run")
    assert result.code == 1
    assert "is also an input" in result.err
