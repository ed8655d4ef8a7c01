"""A Hub that misbehaves: the push completes with the right bytes, or stops with one line; never half a model."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub._commit_api
import pytest
from hub.pushing import READER, STRANGER, Merge, folder_content, history, pushed, uploads

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import TransferError
from streammerge.hub.commit import Commit
from streammerge.testing import Fault, Hub

pytestmark = pytest.mark.usefixtures("impatient")

PREUPLOAD, BATCH, PUT = "*/preupload/*", "*/info/lfs/objects/batch", "/upload/*"
VERIFY, COMMIT, CREATE = "/api/complete/*/verify", "*/commit/*", "/api/repos/create"
WHOAMI, INFO, TREE = "/api/whoami-v2", "*/revision/main", "*/tree/*"

MENDED = {
    **{f"503 at {path}": Fault("status", path=path) for path in (WHOAMI, INFO, CREATE, TREE, PREUPLOAD, BATCH)},
    **{f"500 at {path}": Fault("status", status=500, path=path, times=2) for path in (PUT, VERIFY, COMMIT)},
    **{f"429 at {path}": Fault("rate_limit", seconds=0, path=path) for path in (WHOAMI, BATCH, PUT, COMMIT)},
    **{f"reset at {path}": Fault("reset", path=path) for path in (WHOAMI, INFO, TREE, PREUPLOAD, BATCH)},
    "upload cut": Fault("reset_upload", path=PUT, nbytes=1000),
    "answer to an upload lost": Fault("lost_reply", path=PUT),
    "signed address expired": Fault("expired", path=PUT, times=2),
    "answer to the creation lost": Fault("lost_reply", path=CREATE),
    "answer to the commit lost": Fault("lost_reply", path=COMMIT),
    "answer to the commit cut": Fault("reset", path=COMMIT, nbytes=3),
    "conflict that passes": Fault("conflict", path=COMMIT),
    "slow answers": Fault("slow", path="/api/*", nbytes=64, seconds=0.001, times=5),
}


@pytest.mark.parametrize("fault", MENDED.values(), ids=MENDED)
def test_a_passing_fault_is_mended(hub: Hub, merge: Merge, local: dict[str, bytes], fault: Fault) -> None:
    armed = hub.misbehave(fault)
    merge(None, "org/new")
    assert armed.struck
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert len(uploads(hub)) <= len(set(uploads(hub))) + fault.times


LASTING = {
    "upload fails": (Fault("status", path=PUT, after=1, times=None), ", file model-00002-of-"),
    "no address for the upload": (Fault("status", path=BATCH, after=1, times=None), ", file model-00002-of-"),
    "uploads are cut": (Fault("reset_upload", path=PUT, nbytes=9, after=2, times=None), ", file model-00003-of-"),
    "addresses expire at once": (Fault("expired", path=PUT, after=1, times=None), ", file model-00002-of-"),
    "rate limit": (Fault("rate_limit", path=PREUPLOAD, seconds=0, after=1, times=None), ", file model-00002-of-"),
    "upload not found": (Fault("status", status=404, path=VERIFY, times=None), ", file model-00001-of-"),
    "commit fails": (Fault("status", path=COMMIT, times=None), ": the commit: the Hub answers 503"),
    "commit refused": (Fault("status", status=400, path=COMMIT, times=None), ": the commit: the Hub answers 400"),
    "conflict": (Fault("conflict", path=COMMIT, times=None), ": the commit: the Hub answers 412"),
    "creation fails": (Fault("status", path=CREATE, times=None), ": making it: the Hub answers 503"),
    "commits are forbidden": (Fault("status", status=403, path=COMMIT, times=None), ": the commit: not allowed"),
}


@pytest.mark.parametrize(("fault", "words"), LASTING.values(), ids=LASTING)
def test_a_lasting_fault_is_one_line_and_the_next_run_goes_on(
    hub: Hub, merge: Merge, local: dict[str, bytes], fault: Fault, words: str
) -> None:
    hub.misbehave(fault)
    with pytest.raises(TransferError) as caught:
        merge(None, "org/new")
    message = str(caught.value)
    assert message.startswith("push to org/new") and words in message
    assert "\n" not in message and "Signature" not in message and "hf_marker" not in message
    if "org/new" in hub.repositories:
        assert history(hub) == ["initial commit"]
    hub.behave()
    sent = uploads(hub)
    merge(None, "org/new")
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert len(set(uploads(hub))) == len(uploads(hub)) - len(sent) + len(set(sent))  # nothing twice


def test_an_upload_that_fails_stops_the_merge(hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this a merge of days would go on to its end for nothing."""
    hub.misbehave(Fault("status", status=400, path=PREUPLOAD, times=None))
    written = []
    read = Checkpoint.read_into

    def reading(self: Checkpoint, info: Any, *arguments: Any) -> None:
        written.append(info.name)
        read(self, info, *arguments)

    monkeypatch.setattr(Checkpoint, "read_into", reading)
    with pytest.raises(TransferError, match="file model-00001-of-000.*: upload failed: the Hub answers 400"):
        merge(None, "org/new", max_shard_bytes="1KB")
    names = [name for name in written if "layers.1." in name and "layernorm" in name]
    assert len(names) <= 12  # the fingerprints' reads


def test_a_proxy_that_drops_the_connection_for_good(hub: Hub, merge: Merge) -> None:
    hub.misbehave(Fault("reset", path=WHOAMI, times=None))
    with pytest.raises(TransferError) as caught:
        merge(None, "org/new")
    assert re.match(r"push to org/new: asking who is logged in: \w+Error", str(caught.value))


@pytest.mark.parametrize("kept", [True, False], ids=["kept here", "gone from here"])
def test_what_the_hub_has_lost_is_made_again(
    hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    lost = []
    ask = Commit._ask

    def losing(self: Commit) -> Any:
        if not lost:
            for name in ("model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"):
                lost.append(self._files[name].sha256)
                hub.lose_object("org/new", lost[-1])
        return ask(self)

    monkeypatch.setattr(Commit, "_ask", losing)
    merge(tmp_path / "out" if kept else None, "org/new")
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert uploads(hub)[4:] == lost and sorted({*uploads(hub)}) == sorted(uploads(hub)[:4])
    if kept:
        assert folder_content(tmp_path / "out") == local


def test_a_hub_that_keeps_losing_things(hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Commit._ask

    def losing(self: Commit) -> Any:
        hub.lose_object("org/new", self._files["model-00002-of-00004.safetensors"].sha256)
        return ask(self)

    monkeypatch.setattr(Commit, "_ask", losing)
    with pytest.raises(TransferError, match="file model-00002-of-00004.safetensors: uploaded 3 times, and each time"):
        merge(None, "org/new")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json"])
def test_a_gitignore_leaves_nothing_out_silently(
    hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ask_modes = huggingface_hub._commit_api._fetch_upload_modes

    def ignoring(additions: Any, **options: Any) -> None:
        ask_modes(additions=additions, **options)
        for addition in additions:
            addition._should_ignore = addition.path_in_repo == name

    monkeypatch.setattr(huggingface_hub._commit_api, "_fetch_upload_modes", ignoring)
    with pytest.raises(TransferError, match=f"file {name}: the repository's .gitignore leaves it out"):
        merge(None, "org/new")
    assert history(hub) == ["initial commit"]


def test_tiny_shards_that_the_hub_wants_in_the_commit(
    hub: Hub, merge: Merge, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_modes = huggingface_hub._commit_api._fetch_upload_modes

    def regular(additions: Any, **options: Any) -> None:
        ask_modes(additions=additions, **options)
        for addition in additions:
            addition._upload_mode = "regular"

    monkeypatch.setattr(huggingface_hub._commit_api, "_fetch_upload_modes", regular)
    merge(None, "org/new")
    assert pushed(hub) == local and uploads(hub) == []


REFUSED = {
    "not logged in": ("", "org/new", "not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"),
    "a wrong token": ("hf_wrong", "org/new", "HF_TOKEN is set and not accepted by the Hub"),
    "a token for reading": (READER, "org/there", "checking the right to write: not allowed"),
    "somebody else's": (STRANGER, "org/there", "checking the right to write: not allowed (Forbidden: "),
    "somebody else's name": (STRANGER, "org/new", "there is no such repository, or none that you may see, and"),
    "a private one of somebody else": (STRANGER, "org/secret", "there is no such repository, or none that you may see"),
}


@pytest.mark.parametrize(("token", "repository", "words"), REFUSED.values(), ids=REFUSED)
def test_who_may_not_push_learns_so_before_anything_is_read(
    hub: Hub,
    merge: Merge,
    saved_models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    repository: str,
    words: str,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("notes")
    for name in ("org/there", "org/secret"):
        hub.add(name, tmp_path / "there")
    hub.repositories["org/secret"].private = True
    monkeypatch.setenv("HF_TOKEN", token)
    with monkeypatch.context() as patch, pytest.raises(TransferError) as caught:
        patch.setattr("streammerge.engine.Engine.run", lambda self: pytest.fail("the merge has begun"))
        merge(None, repository)
    message = str(caught.value)
    assert message.startswith(f"push to {repository}: {words}") and "\n" not in message
    assert token == "" or token not in message
    assert uploads(hub) == []
    assert folder_content(tmp_path / "assets") == {}


def test_offline(hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(TransferError, match="push to org/new: HF_HUB_OFFLINE is set"):
        merge(None, "org/new")
    assert hub.record == []


def test_a_cache_that_cannot_be_written(hub: Hub, merge: Merge, tmp_path: Path) -> None:
    (tmp_path / "assets").write_text("a file")
    with pytest.raises(TransferError, match="assets.*, which cannot be written: set HF_HOME"):
        merge(None, "org/new")
    assert hub.repositories == {}


def test_requests_do_not_wait_for_ever(hub: Hub, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.hub.target._WAITING", (5.0, 0.2, 5.0))
    hub.misbehave(Fault("stall", path=WHOAMI, seconds=2))
    merge(None, "org/new")
    assert len([e for e in hub.record if e.path == WHOAMI]) == 2
