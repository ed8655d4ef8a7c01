"""Pushing a finished folder, as a call and as a command; and what the settings refuse."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hub.pushing import STRANGER, TOKEN, history, pushed, recipe, uploads
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tiny_models import Models, Run

import streammerge
from streammerge.errors import CheckpointError, OutputExistsError, RecipeError, TransferError
from streammerge.hub.ledger import Ledger
from streammerge.hub.settings import PushSettings
from streammerge.schema import build
from streammerge.testing import Fault, Hub

MESSAGE = "Upload a merge by task_arithmetic"


@pytest.fixture
def folder(local: dict[str, bytes], tmp_path: Path) -> Path:
    for name, raw in local.items():
        path = tmp_path / "merged" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return tmp_path / "merged"


def test_a_folder(hub: Hub, folder: Path, local: dict[str, bytes]) -> None:
    (folder / "notes.txt").write_text("what the manifest does not name is not pushed")
    result = streammerge.push(folder, "org/new")
    commit = next(hub.repositories["org/new"].history()).oid
    assert result == {"url": f"{hub.url}/org/new/commit/{commit}", "commit": commit, "pull_request": None, "new": True}
    assert pushed(hub) == local
    assert history(hub) == [MESSAGE, "initial commit"]
    assert streammerge.push(folder, "org/new") == {**result, "new": False}
    assert len(history(hub)) == 2 and len(uploads(hub)) == len(set(uploads(hub)))


def test_a_pull_request_is_opened_once(hub: Hub, folder: Path, local: dict[str, bytes]) -> None:
    streammerge.push(folder, "org/new", revision="other")
    first = streammerge.push(folder, "org/new", create_pr=True, commit_message="A merge")
    assert first["pull_request"] == "refs/pr/1" and pushed(hub, revision="refs/pr/1") == local
    assert streammerge.push(folder, "org/new", create_pr=True, commit_message="A merge") == first
    assert streammerge.push(folder, "org/new", create_pr=True, commit_message="Another")["pull_request"] == "refs/pr/2"
    hub.repositories["org/new"].discussions[1].status = "closed"
    assert streammerge.push(folder, "org/new", create_pr=True, commit_message="A merge")["pull_request"] == "refs/pr/3"
    assert history(hub) == ["initial commit"]


def spoil(folder: Path) -> None:
    path = folder / "model-00002-of-00004.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_spoilt_folder(hub: Hub, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(
        CheckpointError, match="model-00002-of-00004.safetensors differs from the SHA-256.*nothing is pushed"
    ):
        streammerge.push(folder, "org/new")
    assert hub.repositories == {}


def test_no_finished_merge(hub: Hub, saved_models: Models, tmp_path: Path) -> None:
    for path in (saved_models.base, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no streammerge.json"):
            streammerge.push(path, "org/new")
    assert hub.record == []


def test_who_may_not_push_waits_for_no_hashing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    spoil(folder)
    with pytest.raises(TransferError, match="push to org/new: not logged in to the Hub"):
        streammerge.push(folder, "org/new")


def test_other_weights_there(hub: Hub, folder: Path, models: Models, local: dict[str, bytes]) -> None:
    hub.add("org/new", models.ft)
    with pytest.raises(OutputExistsError, match="it holds model.safetensors, and the model to come does not"):
        streammerge.push(folder, "org/new")
    streammerge.push(folder, "org/new", delete_patterns=["*.safetensors"])
    assert pushed(hub) == local


@pytest.mark.usefixtures("impatient")
def test_what_the_hub_has_lost_is_uploaded_again(hub: Hub, folder: Path, local: dict[str, bytes]) -> None:
    hub.misbehave(Fault("lost_objects", path="*/commit/main"))
    streammerge.push(folder, "org/new")
    assert pushed(hub) == local and len(history(hub)) == 2
    hub.misbehave(Fault("lost_objects", path="*/commit/main", times=None))
    with pytest.raises(TransferError, match="push to org/other, file model-00001-.*: uploaded 3 times"):
        streammerge.push(folder, "org/other")
    assert history(hub, "org/other") == ["initial commit"]


def test_the_command(
    hub: Hub, folder: Path, local: dict[str, bytes], run: Run, saved_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = f"note: the manifest names local folders or files: {saved_models.base}, {saved_models.ft}\n"
    result = run("push", folder, "org/new", "--private", "--commit-message", "Mine", "-q")
    commit = next(hub.repositories["org/new"].history()).oid
    assert result == (0, f"pushed: {hub.url}/org/new/commit/{commit}\n", note)
    assert history(hub)[0] == "Mine" and hub.repositories["org/new"].private
    again = run("push", folder, "org/new", "-q")
    assert again == (0, f"already there, nothing to push: {hub.url}/org/new/commit/{commit}\n", note)
    options = ("--revision", "next", "--delete-patterns", "*.txt", "--delete-patterns", "notes/*", "--no-private")
    assert not json.loads(run("push", folder, "org/new", *options, "--json", "-q").out)["new"]  # it left main there
    assert pushed(hub, revision="next") == local
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    refused = run("push", folder, "org/new", "-q")
    assert (refused.code, refused.out) == (1, "") and refused.err.count("\n") == 1
    assert refused.err.startswith("streammerge: error: push to org/new: there is no such repository, or none")
    assert "none can be made: no organisation 'org' among yours: stranger" in refused.err


def test_the_commands_of_a_merge(hub: Hub, run: Run, saved_models: Models, local: dict[str, bytes]) -> None:
    pair = ("--base", saved_models.base, "--ft", saved_models.ft, "-m", "task_arithmetic", "--max-shard-size", "6KB")
    result = run(*pair, "--push-to-hub", "org/new", "-q")
    commit = next(hub.repositories["org/new"].history()).oid
    assert result.code == 0, result.err
    told = f"26 tensors merged, 0 copied from the base: 23.4 KB\npushed: {hub.url}/org/new/commit/{commit}\n"
    assert result.out.splitlines()[1:] == told.splitlines()[1:] and " in " not in result.out
    assert pushed(hub) == local
    target = ("--push-to-hub", "org/new", "--revision", "next")
    plan = run("plan", *pair, *target)
    assert plan.code == 0, plan.err
    assert "next" not in hub.repositories["org/new"].branches
    peaks = [json.loads(run("plan", *pair, *more, "--json").out)["peak_host_bytes"] for more in ((), target)]
    assert peaks[1] - peaks[0] == 20 << 20  # the client; hf_xet, which is switched off here, would take more
    refused = run("plan", *pair, "--push-to-hub", "them/new", "--parent-commit", 40 * "0")
    assert refused.code == 1 and "there is no such repository yet" in refused.err
    for options, words in (
        (("--private", "--out", "out"), "--private"),
        ((), "--push-to-hub"),
        (("--create-pr", "--out", "out"), "--create-pr"),
    ):
        usage = run(*pair, *options)
        assert usage.code == 2 and words in usage.err


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no organisation": ({"repository": "merged"}, "must be a repository on the Hub, org/name"),
    "an address": ({"repository": "https://huggingface.co/org/name"}, "org/name"),
    "a way out": ({"repository": "org/.."}, "org/name"),
    "two dashes": ({"repository": "org/a--b"}, "org/name"),
    "too long": ({"repository": "org/" + 97 * "a"}, "a name may have 96 characters, and one has 97"),
    "no letter first": ({"repository": "alice/-x-"}, "a letter or digit at either end"),
    "git": ({"repository": "alice/x.git"}, "not ending with .git"),
    "a line's end": ({"repository": "alice/x\n"}, "org/name"),
    "a blank branch": ({"revision": "bad branch"}, "cannot be a branch: it has the character ' ' in it"),
    "no branch": ({"revision": ""}, "revision '': cannot be a branch: it is empty"),
    "a commit for a branch": ({"revision": 40 * "a"}, "must be a branch: to a commit nothing can be pushed"),
    "a full ref": ({"revision": "refs/heads/main"}, "by its plain name, or refs/pr/N"),
    "an empty pattern": ({"delete_patterns": ["*.txt", ""]}, "a pattern must not be empty"),
    "no commit": ({"parent_commit": "main"}, "40 hexadecimal digits"),
    "no message": ({"commit_message": "  "}, "must not be empty"),
    "a parent of a pull request": ({"create_pr": True, "parent_commit": 40 * "0"}, "does not go with create_pr"),
    "misspelt": ({"privat": True}, "did you mean 'private'?"),
}


@pytest.mark.parametrize(("values", "words"), REFUSED.values(), ids=REFUSED)
def test_settings_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(PushSettings, {"repository": "org/name", **values}, "push")
    assert str(caught.value).startswith("push: ") and words in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "a/-b", "a/b-", "a/.b", "a/_b", "-a/b", "a/b.git", "a/b--c", "a/" + 96 * "x"])
def test_repositories_are_called_as_the_client_has_it(name: str) -> None:
    try:
        validate_repo_id(name)
        taken = True
    except HFValidationError:
        taken = False
    if taken:
        PushSettings(repository=name)
    else:
        with pytest.raises(ValueError, match="push|repository"):
            PushSettings(repository=name)


EMPTY: dict[str, tuple[str, ...]] = {
    "revision": ("--push-to-hub", "org/new", "--revision", ""),
    "commit_message": ("--push-to-hub", "org/new", "--commit-message", ""),
    "delete_patterns": ("--push-to-hub", "org/new", "--delete-patterns", ""),
    "parent_commit": ("--push-to-hub", "org/new", "--parent-commit", ""),
    "repository": ("--push-to-hub", ""),
    "nothing after the @": ("--ft", "org/ft@"),
}


@pytest.mark.parametrize(("word", "options"), EMPTY.items(), ids=EMPTY)
def test_an_empty_value_is_no_value(
    hub: Hub, run: Run, saved_models: Models, word: str, options: tuple[str, ...]
) -> None:
    ft = () if "--ft" in options else ("--ft", saved_models.ft)
    result = run("plan", "--base", saved_models.base, *ft, "-m", "task_arithmetic", *options)
    assert (result.code, result.out) == (1, "") and result.err.count("\n") == 1 and word in result.err, result.err
    assert hub.record == []


def test_settings_are_checked_before_anything_else(hub: Hub, saved_models: Models) -> None:
    with pytest.raises(RecipeError, match="push: repository"):
        streammerge.merge(recipe(saved_models), push_to_hub="merged")
    assert hub.record == []


def ledger(work: Path, repository: str = "org/a", **values: Any) -> Ledger:
    return Ledger(work, PushSettings(repository=repository, **values), "https://hub")


def test_a_ledger_keeps_what_is_uploaded_for_its_repository(tmp_path: Path) -> None:
    first = ledger(tmp_path)
    assert not first.begun
    first.begin("c0")
    first.add("x", 1, "aa")
    first.add("y", 1, "bb")
    first.lose("x")
    first.commit()
    first.close()
    again = ledger(tmp_path)
    assert (again.begun, again.head, again.committing, again.uploaded) == (True, "c0", True, {"y": "bb"})
    again.begin("c1")  # onto another commit
    assert (again.head, again.committing) == ("c1", False)
    again.close()
    branch = ledger(tmp_path, revision="next")
    assert (branch.begun, branch.head, branch.uploaded) == (False, None, {"y": "bb"})
    branch.begin("c2")
    branch.close()
    other = ledger(tmp_path, "org/b")
    assert (other.begun, other.uploaded) == (False, {})
    other.begin(None)
    other.add("z", 1, "cc")
    other.close()
    back = ledger(tmp_path)
    assert (back.begun, back.head, back.uploaded) == (True, "c1", {"y": "bb"})
    back.close()


def test_a_ledger_torn_in_its_last_line(tmp_path: Path) -> None:
    first = ledger(tmp_path)
    first.begin("c0")
    first.add("x", 1, "aa")
    first.add("y", 1, "bb")
    first.close()
    os.truncate(tmp_path / "uploads", os.path.getsize(tmp_path / "uploads") - 3)
    again = ledger(tmp_path)
    assert again.uploaded == {"x": "aa"}
    again.close()
    assert TOKEN not in (tmp_path / "uploads").read_text()
