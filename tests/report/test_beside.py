"""report.html is beside a merge and no part of it: whatever reads, checks, resumes, replaces or pushes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from tiny_models import Models, Run, content

import streammerge
from streammerge import figures
from streammerge.checkpoints import writer
from streammerge.checkpoints.checkpoint import REPORT_FILE, Checkpoint
from streammerge.checkpoints.output import REPORT_MARK, WORK_DIR, files_of_manifest
from streammerge.report import drawing
from streammerge.report.page import report_page

pytestmark = pytest.mark.usefixtures("reports")

Merged = Callable[..., Path]


def test_all_else_has_the_bytes_of_a_merge_without(merged: Merged) -> None:
    found, again, without = (
        content(merged(name, *options)) for name, *options in (("a",), ("b",), ("c", "--no-report"))
    )
    assert found.pop(REPORT_FILE) != again.pop(REPORT_FILE), "two runs take different times"
    assert found == again == without
    assert REPORT_FILE not in (without["streammerge.json"] or b"").decode()


def test_verify_does_not_look_at_it(merged: Merged) -> None:
    out = merged()
    assert streammerge.verify(out)["ok"]
    (out / REPORT_FILE).write_text("changed")
    assert streammerge.verify(out)["ok"]
    (out / REPORT_FILE).unlink()
    assert streammerge.verify(out, sources={})["ok"]


def test_a_merge_of_a_merge_does_not_take_it_over(merged: Merged, models: Models, tmp_path: Path) -> None:
    out = merged()
    with Checkpoint.open(out) as base:
        assert REPORT_FILE not in base.side_files()
    recipe = {"base": str(out), "models": [str(models.ft)], "method": "task_arithmetic"}
    streammerge.merge(recipe, tmp_path / "next", report=False)
    assert REPORT_FILE not in content(tmp_path / "next")


def test_overwriting_replaces_ours(merged: Merged) -> None:
    out = merged()
    before = (out / REPORT_FILE).read_bytes()
    assert merged("merged", "--overwrite") == out
    assert (out / REPORT_FILE).read_bytes() != before
    merged("merged", "--overwrite", "--no-report")
    assert not (out / REPORT_FILE).exists()


def foreign_file(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<p>my own notes")


@pytest.mark.parametrize("put", [foreign_file, Path.mkdir], ids=["file", "folder"])
def test_overwriting_leaves_what_is_not_ours(
    merged: Merged, models: Models, run: Run, put: Callable[[Path], None]
) -> None:
    out = merged("merged", "--no-report")
    put(out / REPORT_FILE)
    before = content(out)
    result = run("--base", models.base, "--ft", models.ft, "-m", "task_arithmetic", "--out", out, "--overwrite", "-q")
    assert result.code == 1 and f"also holds '{REPORT_FILE}', which is not ours to remove" in result.err
    assert content(out) == before


def test_a_fishers_folder_has_none(saved_fisher: Path, tmp_path: Path) -> None:
    folder = Path(copytree(saved_fisher, tmp_path / "fisher"))
    (folder / REPORT_FILE).write_bytes(REPORT_MARK)
    assert REPORT_FILE not in (files_of_manifest(folder, "fisher.json") or [])


def test_it_comes_after_everything(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees it sees a finished merge; one that ends just before goes on and leaves it."""
    moved: list[str] = []
    rename = writer.disk.rename

    def stop_at_the_report(source: Path, target: Path) -> None:
        if target.name == REPORT_FILE:
            raise OSError(5, "Input/output error")
        moved.append(target.name)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer.disk, "rename", stop_at_the_report)
        with pytest.raises(AssertionError, match="moving the finished files into place: Input/output error"):
            merged("one", "--max-shard-size", "6KB")
    out = merged("two", "--max-shard-size", "6KB").parent / "one"
    assert moved[-1] == "model.safetensors.index.json"
    assert (out / WORK_DIR).is_dir() and not (out / REPORT_FILE).exists()
    merged("one", "--max-shard-size", "6KB")
    found, whole = content(out), content(out.parent / "two")
    assert b"An earlier run was interrupted" in (found.pop(REPORT_FILE) or b"")
    assert b"An earlier run was interrupted" not in (whole.pop(REPORT_FILE) or b"")
    assert found == whole


def test_a_run_that_ends_early_leaves_none(merged: Merged, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise streammerge.errors.TransferError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "wait", fail)
        with pytest.raises(AssertionError, match="no room"):
            merged()
    assert not list(models.base.parent.rglob(REPORT_FILE))


def test_without_matplotlib_one_note_says_how_to_get_it(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    pair = ("--base", models.base, "--ft", models.ft, "-m", "ties", "-q")
    result = run(*pair, "--out", tmp_path / "out")
    assert result.code == 0
    assert (
        result.err
        == "note: no report.html, which takes matplotlib: pip install -c constraints.txt '.[plot]' in the checkout\n"
    )
    assert REPORT_FILE not in content(tmp_path / "out")
    assert run(*pair, "--out", tmp_path / "other", "--no-report").err == ""


BROKEN: dict[str, tuple[str, Any, str]] = {
    "a library that fails": (
        "_CODE",
        "raise ImportError('numpy.core.multiarray failed to import')",
        "which could not be drawn: ImportError: numpy.core.multiarray failed to import",
    ),
    "a library that ends the process": ("_CODE", "import os; os._exit(3)", "which could not be drawn: exit status 3"),
    "one that never ends": ("_SECONDS", 0.01, "which was not drawn within 0.01 seconds"),
    "memory": ("memory_limits", lambda: {"the control group allows": 1 << 20}, "of memory, and 0 MiB are left"),
}


@pytest.mark.parametrize(("name", "value", "words"), BROKEN.values(), ids=BROKEN)
def test_a_picture_costs_nobody_a_merge(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, words: str
) -> None:
    monkeypatch.setattr(drawing, name, value)
    result = run("--base", models.base, "--ft", models.ft, "-m", "ties", "-q", "--out", tmp_path / "out")
    assert result.code == 0
    assert result.err.startswith("note: no report.html, which ") and words in result.err
    assert result.err.count("\n") == 1
    assert streammerge.verify(tmp_path / "out")["ok"] and REPORT_FILE not in content(tmp_path / "out")


def test_no_code_of_the_current_folder_runs(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of models from strangers may hold a yaml.py."""
    for name in ("json", "yaml", "matplotlib", "streammerge"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a stranger ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert (merged() / REPORT_FILE).exists()


def test_it_is_within_what_is_planned_of_the_disk(merged: Merged) -> None:
    """The room that is asked for beside the shards: 1 MiB, and 2048 bytes for each tensor."""
    out = merged()
    manifest = json.loads((out / "streammerge.json").read_text())
    entry = next(iter(manifest["tensors"].values())) | {
        "block": 0,
        "kept": [5, 7],
        "norm_ratio": 1.01,
        "rescaled": True,
    }
    names = [f"model.layers.{block}.mlp.part_{part}.weight" for block in range(60) for part in range(200)]
    manifest["tensors"] = {name: {**entry, "block": int(name.split(".")[2])} for name in names}
    manifest["blocks"] = [
        {"block": block, "alpha": 0.5, "fisher_mean": 1.0, "task_vector_mean_square": 1.0, "score": 0.0}
        for block in range(60)
    ]
    size = len(report_page(manifest, []))
    told = 3 * len(json.dumps(manifest["tensors"], indent=2))  # the tensor's share of journal, manifest and index
    assert size + told <= (1 << 20) + 2048 * len(names)
