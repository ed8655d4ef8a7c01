"""What is refused of a push's target before anything is read, and what is told of it."""

from typing import Any

import pytest
from hub.pushing import STRANGER, Merge, history
from huggingface_hub import HfApi
from tiny_models import Models, Run

import streammerge
from streammerge.errors import StreammergeError, TransferError
from streammerge.hub.login import FLAWED_TOKEN
from streammerge.testing import Fault, Hub


@pytest.fixture
def there(hub: Hub, models: Models) -> str:
    """A repository with a merged model's layout, to be pushed over; its commit."""
    hub.add("org/base", models.base)
    return hub.add("org/x", models.ft)


def read_nothing(hub: Hub) -> bool:
    return not {e.endpoint for e in hub.record} & {"preupload", "commit", "create-repository", "create-branch"}


def test_a_branch_and_nothing_else(hub: Hub, merge: Merge, there: str) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_tag("org/x", tag="v1")
    api.create_branch("org/x", branch="next")
    hub.record.clear()
    for push in ({"revision": "v1"}, {"revision": "v1", "create_pr": True}):
        with pytest.raises(TransferError, match=r"push to org/x@v1: that is a tag or a commit there.*give a branch"):
            merge(None, {"repository": "org/x", **push})
    assert read_nothing(hub)
    merge(None, {"repository": "org/x", "revision": "next"}, max_shard_bytes="1GB")
    assert history(hub, "org/x", "next")[0].startswith("Upload a merge")


def test_a_namespace_that_is_not_yours(hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    words = "push to bob/x: there is no such repository.*no organisation 'bob' among yours: stranger"
    with pytest.raises(TransferError, match=words):
        merge(None, "bob/x")
    merge(None, "stranger/x")


def test_no_right_to_make_one(hub: Hub, merge: Merge, tmp_path: Any) -> None:
    hub.misbehave(Fault("status", path="/api/repos/create", status=403, times=None))
    with pytest.raises(TransferError) as refused:
        merge(None, "org/new")
    text = str(refused.value)
    assert "push to org/new: there is no such repository" in text and "no right to make one in 'org'" in text
    assert "--create-pr" not in text
    assert [*(tmp_path / "assets").rglob("*")] == []  # and nothing is left of it


def test_a_parent_that_never_was(hub: Hub, merge: Merge, there: str) -> None:
    with pytest.raises(TransferError) as refused:
        merge(None, {"repository": "org/x", "parent_commit": 40 * "0"})
    assert f"it is at {there}, and --parent-commit asks for {40 * '0'}" in str(refused.value)
    assert "meanwhile" not in str(refused.value)


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("base", ["org/base", "hf://org/base@main", "ORG/base@{commit}"])
def test_no_input_is_overwritten(
    hub: Hub, run: Run, saved_models: Models, models: Models, command: str, base: str
) -> None:
    commit = hub.add("org/base", models.base)
    hub.repositories["ORG/base"] = hub.repositories["org/base"]
    arguments = ("--base", base.format(commit=commit), "--ft", saved_models.ft, "-m", "task_arithmetic")
    refused = run(command, *arguments, "--push-to-hub", "org/base")
    assert refused.code == 1 and "push to org/base: it is one of the models merged: push to another" in refused.err
    assert read_nothing(hub)
    for more in (("--revision", "merged"), ("--create-pr",)):
        allowed = run("plan", *arguments, "--push-to-hub", "org/base", *more)
        assert allowed.code == 0, allowed.err


def test_a_token_with_characters_that_none_has(
    hub: Hub, run: Run, saved_models: Models, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_\u00fc", "hf_a\x01b"):
        monkeypatch.setenv("HF_TOKEN", token)
        for arguments in (("--base", "org/base"), ("--base", saved_models.base, "--push-to-hub", "org/new")):
            result = run("plan", *arguments, "--ft", saved_models.ft, "-m", "task_arithmetic")
            assert result.code == 1 and result.err.endswith(f": {FLAWED_TOKEN}\n"), result
            assert token not in result.err and result.err.count("\n") == 1


def test_an_endpoint_that_is_no_address(
    hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch, there: str, saved_models: Models
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "localhost:1")
    for call in (lambda: merge(None, "org/new"), lambda: merge(None, "org/new", base="org/base")):
        with pytest.raises(StreammergeError, match="HF_ENDPOINT is no address of a Hub: it begins with http://"):
            call()
    with pytest.raises(StreammergeError, match="HF_ENDPOINT is no address of a Hub: it begins with http://"):
        streammerge.plan({"base": "org/base", "models": [str(saved_models.ft)]})
