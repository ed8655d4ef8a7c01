"""A merge that is pushed while it runs: the same bytes, one commit, two shards on disk."""

import json
from pathlib import Path

import pytest
from hub.pushing import STRANGER, TOKEN, Merge, folder_content, history, pushed, recipe, sampled, uploads
from tiny_models import Models

import streammerge
from streammerge.errors import OutputExistsError, StreammergeError, TransferError
from streammerge.testing import Fault, Hub

MESSAGE = "Upload a merge by task_arithmetic"
INITIAL = "initial commit"


@pytest.mark.parametrize("keep", [True, False], ids=["out", "no out"])
def test_the_pushed_model_is_that_of_a_local_merge(
    hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path, keep: bool
) -> None:
    out = tmp_path / "out" if keep else None
    result = merge(out, "org/new")
    assert pushed(hub) == local
    assert history(hub) == [MESSAGE, INITIAL]
    commit = next(hub.repositories["org/new"].history()).oid
    url = f"{hub.url}/org/new/commit/{commit}"
    assert result["push"] == {"url": url, "commit": commit, "pull_request": None, "new": True}
    assert {k: v for k, v in result.items() if k != "push"} == json.loads(local["streammerge.json"])
    assert len(uploads(hub)) == len(set(uploads(hub))) == len(result["shards"]) > 3
    if out is not None:
        assert folder_content(out) == local
    assert folder_content(tmp_path / "assets") == {}


@pytest.mark.usefixtures("reports")
def test_the_report_stays_here(hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path) -> None:
    """It says how long this machine took, and names its folders; the card has what is for others."""
    merge(tmp_path / "out", "org/new")
    assert "report.html" in folder_content(tmp_path / "out")
    streammerge.push(tmp_path / "out", "org/two")
    assert pushed(hub) == pushed(hub, "org/two") == local
    merge(None, "org/three")
    assert pushed(hub, "org/three") == local


def test_a_single_shard_has_no_index(hub: Hub, merge: Merge, tmp_path: Path) -> None:
    merge(tmp_path / "out", max_shard_bytes="1GB")
    merge(None, "org/new", max_shard_bytes="1GB")
    assert pushed(hub) == folder_content(tmp_path / "out")
    assert "model.safetensors" in pushed(hub) and "model.safetensors.index.json" not in pushed(hub)


def test_large_shards_go_in_parts(hub: Hub, merge: Merge, local: dict[str, bytes]) -> None:
    hub.part_bytes = 1000
    merge(None, "org/new")
    assert pushed(hub) == local
    assert any(e.path.endswith("/3") and e.host == "storage" for e in hub.record)


@pytest.mark.parametrize("threads", [1, 4])
def test_at_no_moment_do_more_than_two_shards_lie_on_disk(
    hub: Hub, saved_models: Models, local: dict[str, bytes], tmp_path: Path, threads: int
) -> None:
    hub.misbehave(Fault("stall", path="/upload/*", seconds=0.1, times=None))  # the merge is the faster one
    job = recipe(saved_models)
    _, seen = sampled(tmp_path, lambda: streammerge.merge(job, push_to_hub="org/new", threads=threads))
    assert pushed(hub) == local
    assert max(map(len, seen)) == 2  # and one is merged while another is uploaded
    assert len(set().union(*seen)) == len([name for name in local if name.endswith(".safetensors")])


def test_work_that_needs_more_shards_at_once_than_two_goes_on(hub: Hub, saved_models: Models, tmp_path: Path) -> None:
    job = recipe(saved_models, method="karcher", parameters={"granularity": "block"}, max_shard_bytes="1KB")
    streammerge.merge(job, tmp_path / "out")
    streammerge.merge(job, push_to_hub="org/new", threads=4)
    assert pushed(hub) == folder_content(tmp_path / "out")


def test_other_files_stay(hub: Hub, merge: Merge, local: dict[str, bytes], models: Models) -> None:
    (models.ft2 / "notes").mkdir()
    (models.ft2 / "notes" / "mine.txt").write_text("mine")
    (models.ft2 / "model.safetensors").rename(models.ft2 / "older.safetensors")
    hub.add("org/new", models.ft2)
    merge(None, "org/new")
    theirs = {name: raw for name, raw in folder_content(models.ft2).items() if name not in local}
    assert {"notes/mine.txt", "older.safetensors"} <= theirs.keys()
    assert pushed(hub) == {**theirs, **local}


def test_delete_patterns(hub: Hub, merge: Merge, local: dict[str, bytes], models: Models) -> None:
    (models.ft2 / "notes").mkdir()
    for name in ("notes/mine.txt", "LICENSE.old", ".gitattributes"):
        (models.ft2 / name).write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    hub.add("org/new", models.ft2)
    merge(None, {"repository": "org/new", "delete_patterns": ["model*.safetensors*", "notes/", "LICENSE*", ".git*"]})
    assert pushed(hub) == local  # the LICENSE of the new model stays, the old weights are gone
    assert ".gitattributes" in hub.files("org/new")
    assert len(history(hub)) == 2


def test_weights_that_would_not_go_together(hub: Hub, merge: Merge, models: Models, tmp_path: Path) -> None:
    head = hub.add("org/new", models.ft2)
    with pytest.raises(OutputExistsError, match=r"holds model.safetensors.*--delete-patterns 'model\*.safetensors\*'"):
        merge(None, "org/new")
    assert hub.repositories["org/new"].commit_of("main") == head
    assert uploads(hub) == [] and folder_content(tmp_path / "assets") == {}


def test_a_private_repository(hub: Hub, merge: Merge, local: dict[str, bytes]) -> None:
    merge(None, {"repository": "org/new", "private": True})
    assert hub.repositories["org/new"].private
    assert pushed(hub) == local
    merge(None, {"repository": "org/new", "private": True, "revision": "again"})  # it is private: fine
    hub.repositories["org/new"].private = False
    with pytest.raises(OutputExistsError, match="org/new: the repository is public: leave out --private"):
        merge(None, {"repository": "org/new", "private": True})


def test_a_public_repository_by_default(hub: Hub, merge: Merge) -> None:
    merge(None, "me/new")
    assert not hub.repositories["me/new"].private


def test_a_branch_is_made_from_main(hub: Hub, merge: Merge, local: dict[str, bytes]) -> None:
    merge(None, {"repository": "org/new", "revision": "next"})
    assert history(hub) == [INITIAL]
    assert history(hub, revision="next") == [MESSAGE, INITIAL]
    assert pushed(hub, revision="next") == local
    merge(None, {"repository": "org/new", "revision": "third", "commit_message": "So be it"})
    assert history(hub, revision="third") == ["So be it", INITIAL]


def test_a_pull_request(
    hub: Hub, merge: Merge, local: dict[str, bytes], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models.ft2 / "model.safetensors").unlink()
    head = hub.add("org/new", models.ft2)
    monkeypatch.setenv("HF_TOKEN", STRANGER)  # may not write there, and need not
    result = merge(None, {"repository": "org/new", "create_pr": True})
    assert hub.repositories["org/new"].commit_of("main") == head
    assert result["push"]["pull_request"] == "refs/pr/1"
    assert result["push"]["url"] == f"{hub.url}/org/new/discussions/1"
    assert pushed(hub, revision="refs/pr/1") == local
    assert hub.repositories["org/new"].discussions[1].status == "open"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    merge(None, {"repository": "org/new", "revision": "refs/pr/1"})  # a commit more on that very one
    assert list(hub.repositories["org/new"].discussions) == [1]


def test_the_very_model_is_there_already(hub: Hub, merge: Merge) -> None:
    first = merge(None, "org/new")
    again = merge(None, "org/new")
    assert again["push"] == {**first["push"], "new": False}
    assert len(history(hub)) == 2
    assert len(uploads(hub)) == len(set(uploads(hub)))


def test_a_branch_that_moved_meanwhile(hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path) -> None:
    hub.misbehave(Fault("moved_branch", path="*/commit/main", method="POST"))
    with pytest.raises(TransferError) as caught:
        merge(None, "org/new")
    head, before = (commit.oid for commit in hub.repositories["org/new"].history())
    assert str(caught.value) == (
        f"push to org/new: somebody committed to it meanwhile: it is at {head}, not at {before}; look at what changed, "
        f"then give --parent-commit {head} to the same command: it goes on, and commits on top of that"
    )
    assert "model.safetensors.index.json" not in hub.files("org/new")
    sent = len(uploads(hub))
    with pytest.raises(TransferError, match="somebody committed to it meanwhile"):
        merge(None, "org/new")
    merge(None, {"repository": "org/new", "parent_commit": head})
    assert pushed(hub) == {**local, "from-someone-else.txt": b"hello\n"}
    assert len(history(hub)) == 3
    assert len(uploads(hub)) == sent
    assert folder_content(tmp_path / "assets") == {}


def test_a_branch_that_moved_between_two_runs(hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path) -> None:
    hub.misbehave(Fault("status", status=400, path="/api/models/org/new/preupload/*", after=2, times=None))
    with pytest.raises(TransferError):
        merge(None, "org/new")
    hub.behave()
    head = hub.move_branch("org/new", {"theirs.txt": b"theirs"})
    sent = len(uploads(hub))
    with pytest.raises(TransferError, match=f"it is at {head}"):
        merge(None, "org/new")
    assert len(uploads(hub)) == sent  # before any work
    merge(None, {"repository": "org/new", "parent_commit": head})
    assert pushed(hub) == {**local, "theirs.txt": b"theirs"}


def test_a_parent_that_is_not_the_head(hub: Hub, merge: Merge) -> None:
    merge(None, "org/new")
    with pytest.raises(TransferError, match="--parent-commit asks for 0{40}"):
        merge(None, {"repository": "org/new", "parent_commit": 40 * "0"})
    with pytest.raises(TransferError, match="no such repository yet: leave out --parent-commit"):
        merge(None, {"repository": "org/other", "parent_commit": 40 * "0"})


def test_the_same_out_to_another_repository(hub: Hub, merge: Merge, local: dict[str, bytes], tmp_path: Path) -> None:
    hub.misbehave(Fault("status", status=400, path="*/commit/*", times=None))
    with pytest.raises(TransferError, match="the commit: the Hub answers 400"):
        merge(tmp_path / "out", "org/one")
    hub.behave()
    merge(tmp_path / "out", "org/two")
    assert pushed(hub, "org/two") == local == folder_content(tmp_path / "out")
    assert history(hub, "org/one") == [INITIAL]


def test_another_recipe_for_the_same_repository(hub: Hub, merge: Merge) -> None:
    hub.misbehave(Fault("status", status=400, path="*/commit/*"))
    with pytest.raises(TransferError):
        merge(None, "org/new")
    with pytest.raises(OutputExistsError, match="unfinished push to org/new differs in recipe.*--overwrite"):
        merge(None, "org/new", parameters={"coefficient": 0.5})
    merge(None, "org/new", parameters={"coefficient": 0.5}, overwrite=True)
    assert len(history(hub)) == 2


def test_bad_input_leaves_no_repository(hub: Hub, models: Models, tmp_path: Path) -> None:
    (models.ft / "config.json").unlink()
    with pytest.raises(StreammergeError):
        streammerge.merge(recipe(models), push_to_hub="org/new")
    assert hub.repositories == {} and folder_content(tmp_path / "assets") == {}


def test_nowhere_to_go(merge: Merge) -> None:
    with pytest.raises(StreammergeError, match="nowhere to put the result"):
        merge(None, None)
