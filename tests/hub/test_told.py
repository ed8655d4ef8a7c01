"""What a push says beforehand: where it goes, what it replaces, what it shows of this machine, where it cannot work."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub.pushing import Merge, history, recipe
from tiny_models import Models, Run

import streammerge
from streammerge.checkpoints.work import WorkFolder
from streammerge.errors import OutputExistsError, TransferError
from streammerge.hub import operations
from streammerge.hub.destination import local_paths, short_names
from streammerge.hub.publication import make_publication
from streammerge.testing import Fault, Hub


def pair(models: Models) -> tuple[Any, ...]:
    return ("--base", models.base, "--ft", models.ft, "-m", "task_arithmetic")


def test_a_plan_says_where_it_goes(hub: Hub, run: Run, saved_models: Models) -> None:
    commit = hub.add("org/x", saved_models.ft)

    def told(*options: str) -> tuple[str, str]:
        result = run("plan", *pair(saved_models), *options)
        assert result.code == 0, result.err
        rows = [line for line in result.out.splitlines() if line.startswith(("push", "note"))]
        return re.sub(r"^push +", "", rows[0]), "\n".join(rows[1:])

    replaced = f"the push replaces model.safetensors of org/x at commit {commit}"
    row, notes = told("--push-to-hub", "org/x")
    assert row == "org/x, branch main: which is there, public" and replaced in notes
    assert f"the manifest names local folders or files: {saved_models.base}, {saved_models.ft}" in notes
    row, notes = told("--push-to-hub", "org/x", "--create-pr")
    assert row == "a pull request to org/x, branch main: which is there, public" and "replaces" not in notes
    row, notes = told("--push-to-hub", "org/x", "--revision", "next")
    assert row == "org/x, branch next: a new branch of a repository that is there, public" and "replaces" not in notes
    assert told("--push-to-hub", "org/y", "--private")[0] == "org/y, branch main: a new repository, private"
    assert told("--push-to-hub", "org/y")[0].endswith("a new repository, as visible as your new repositories are")
    summary = json.loads(run("plan", *pair(saved_models), "--push-to-hub", "org/x", "--json").out)
    assert summary["push"] == {
        "endpoint": hub.url,
        "repository": "org/x",
        "branch": "main",
        "pull_request": False,
        "new_repository": False,
        "new_branch": False,
        "private": False,
        "commit": commit,
        "replaces": ["model.safetensors"],
        "unwritable": None,
        "local_paths": [str(saved_models.base), str(saved_models.ft)],
    }


def test_a_merge_and_a_push_say_so_too(hub: Hub, run: Run, saved_models: Models, tmp_path: Path) -> None:
    commit = hub.add("org/x", saved_models.ft)
    hub.add("org/y", saved_models.ft)
    notes = [
        f"note: the push replaces model.safetensors of org/x at commit {commit}",
        f"note: the manifest names local folders or files: {saved_models.base}, {saved_models.ft}",
    ]
    merged = run(*pair(saved_models), "--out", tmp_path / "out", "--push-to-hub", "org/x", "-q")
    assert (merged.code, merged.err.splitlines()) == (0, notes)
    pushed = run("push", tmp_path / "out", "org/y", "-q")
    assert pushed.code == 0 and pushed.err.splitlines()[0].startswith(
        "note: the push replaces model.safetensors of org"
    )
    assert pushed.err.splitlines()[1:] == notes[1:]
    again = run(*pair(saved_models), "--out", tmp_path / "out", "--push-to-hub", "org/x", "-q")
    assert again.code == 1 and f"`streammerge push {tmp_path / 'out'} org/x`" in again.err


def test_paths_of_all_kinds() -> None:
    sources = [{"id": "/a/b", "revision": None}, {"id": "org/x", "revision": "c0"}, {"id": "/a/b", "revision": None}]
    job = {"fisher_from": ["/f"], "calibration": {"text": ["/t.txt"]}, "fisher": {"probe_text": "/p.txt"}}
    assert local_paths({"sources": sources, "recipe": job}) == ["/a/b", "/f", "/t.txt", "/p.txt"]
    assert local_paths({"sources": "x", "recipe": None}) == local_paths({}) == []
    names = {"/a/ft": "ft", "/b/ft": "ft-2", "/a/ft/": "ft", "ft/": "ft-3", "/": "folder"}
    assert short_names([*names]) == names


def test_no_room_for_the_work(
    hub: Hub, run: Run, saved_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "shut").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "shut" and allowed(path, mode))
    advice = "set HF_HOME or HF_ASSETS_CACHE to a folder that can, or give --out"
    for above in ("file", "shut"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / above / "assets"))
        refused = run(*pair(saved_models), "--push-to-hub", "org/new")
        assert (refused.code, refused.err.count("\n")) == (1, 1) and advice in refused.err
        assert hub.record == []
        assert advice in run("plan", *pair(saved_models), "--push-to-hub", "org/new").out
        hub.record.clear()
    kept = run(*pair(saved_models), "--push-to-hub", "org/new", "--out", tmp_path / "out", "-q")
    assert kept.code == 0 and advice not in kept.err, kept.err


def test_no_room_for_xet(
    hub: Hub, saved_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge
) -> None:
    merge(tmp_path / "out")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_XET_CACHE", str(tmp_path / "file" / "xet"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(TransferError, match="push to org/new: Xet cannot write into .*, or HF_HUB_DISABLE_XET=1"):
        streammerge.push(tmp_path / "out", "org/new")
    with pytest.raises(TransferError, match="push to org/new: Xet cannot write into .*, or HF_HUB_DISABLE_XET=1"):
        streammerge.merge(recipe(saved_models), push_to_hub="org/new", max_ram=400 << 20)
    assert hub.repositories == {}


@pytest.mark.usefixtures("impatient")
def test_another_push_in_the_work_folder(hub: Hub, merge: Merge, saved_models: Models, tmp_path: Path) -> None:
    armed = hub.misbehave(Fault("status", path="*/commit/main", status=400, times=None))
    with pytest.raises(TransferError):
        merge(None, "org/two")
    with pytest.raises(OutputExistsError, match=r"^an unfinished push to org/two differs in .*finish it or start"):
        merge(None, "org/two", models=[str(saved_models.ft2)])
    assert armed.struck > 0
    publication = make_publication("org/three")
    assert publication is not None
    other = WorkFolder(publication.folder(), fresh=False)
    with pytest.raises(OutputExistsError, match=r"^another push to org/three is at work: wait for it$"):
        merge(None, "org/three")
    other.close()


def test_what_the_hub_says_of_the_card_is_a_note(
    hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["streammerge.merge"], "model_card", lambda *_: "no metadata\n")
    merge(None, "org/new")
    assert "note: the Hub says of the card's metadata: - empty or missing yaml metadata in repo card\n" in (
        capsys.readouterr().err
    )
    with pytest.warns(UserWarning, match="another"), operations.card_warnings_told():
        operations.warnings.warn("another", stacklevel=1)
    assert history(hub)[0].startswith("Upload")
