"""The real client creates repositories and commits to them: what it then finds is what was sent."""

import hashlib
import subprocess
from pathlib import Path
from random import Random

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streammerge.testing import Hub
from streammerge.testing.store import git_oid, lfs_file

# the client's own way of sending LFS files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

SMALL = Random(1).randbytes(500)  # one PUT
LARGE = Random(2).randbytes(3500)  # four parts of at most 1000
CARD = b"---\nlicense: mit\n---\n# A model\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def add(path: str, content: bytes | Path) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def test_a_repository_is_made_once(hub: Hub, api: HfApi) -> None:
    url = api.create_repo("org/model", private=True)
    assert (url.repo_id, str(url)) == ("org/model", f"{hub.url}/org/model")
    assert api.create_repo("org/model", exist_ok=True).repo_id == "org/model"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as refused:
        api.create_repo("org/model")
    assert refused.value.response.status_code == 409
    info = api.model_info("org/model")
    assert (info.private, [file.rfilename for file in info.siblings or ()]) == (True, [".gitattributes"])
    assert api.create_repo("mine").repo_id == "me/mine"
    api.update_repo_settings("me/mine", private=True, gated="manual")
    assert (hub.repositories["me/mine"].private, hub.repositories["me/mine"].gated) == (True, True)
    api.delete_repo("me/mine")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/mine")


def test_one_commit_of_small_lfs_and_multipart_files(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("org/model")
    (tmp_path / "large").write_bytes(LARGE)
    operations = [
        add("model-1.safetensors", SMALL),
        add("model-2.safetensors", tmp_path / "large"),
        add("config.json", b"{}"),
        add("sub/notes.txt", b"notes"),
        add("empty.safetensors", b""),
        add("README.md", CARD),
    ]
    made = api.create_commit("org/model", operations, commit_message="all", commit_description="of it")
    assert made.oid == api.model_info("org/model").sha == hub.repositories["org/model"].branches["main"]
    sent = {"model-1.safetensors": SMALL, "model-2.safetensors": LARGE, "config.json": b"{}", "README.md": CARD}
    sent |= {"sub/notes.txt": b"notes", "empty.safetensors": b""}
    assert {path: hub.read("org/model", path) for path in sent} == sent
    assert {path for path, file in hub.files("org/model").items() if file.lfs} == {
        "model-1.safetensors",
        "model-2.safetensors",
    }
    commit = next(hub.repositories["org/model"].history())
    assert (commit.title, commit.description, commit.author) == ("all", "of it", "me")

    parts = [(e.path.rpartition("/")[2], e.received) for e in hub.record if e.endpoint == "upload"]
    assert sorted(parts) == sorted([(sha256(SMALL), 500), ("1", 1000), ("2", 1000), ("3", 1000), ("4", 500)])
    assert [e.authorization for e in hub.record if e.host == "storage"] == [None] * 5
    done = {name: sums.requests for name, sums in hub.traffic().items()}
    assert (done["lfs-complete"], done["lfs-verify"], done["validate-yaml"], done["commit"]) == (1, 2, 1, 1)


def test_shards_before_the_commit_and_none_twice(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    head = api.model_info("org/model").sha
    operations = [add(f"model-{i}.safetensors", content) for i, content in enumerate((SMALL, LARGE))]
    for operation in operations:
        api.preupload_lfs_files("org/model", [operation])
        assert operation.path_or_fileobj == b""
        assert api.list_repo_files("org/model") == [".gitattributes"]
    uploaded = hub.traffic()["upload"]
    assert uploaded.received == 4000
    assert hub.traffic("file")[f"org/model/{sha256(LARGE)}"].received == 3500

    again = add("model-0.safetensors", SMALL)
    api.preupload_lfs_files("org/model", [again])
    api.create_commit("org/model", [*operations, add("config.json", b"{}")], commit_message="all", parent_commit=head)
    assert hub.traffic()["upload"] == uploaded
    assert hub.read("org/model", "model-1.safetensors") == LARGE
    # what is the same already is left out by the client, from the ids that the preupload answers give
    same = [add("config.json", b"{}"), add("model-0.safetensors", SMALL)]
    unchanged = api.create_commit("org/model", same, commit_message="again")
    assert unchanged.oid == hub.repositories["org/model"].branches["main"]
    assert hub.traffic()["commit"].requests == 1


def test_a_commit_without_its_objects_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    operation = add("model.safetensors", SMALL)
    api.preupload_lfs_files("org/model", [operation])
    hub.lose_object("org/model", sha256(SMALL))
    with pytest.raises(BadRequestError, match=r"LFS pointer pointed to a file that does not exist.*model.safetensors"):
        api.create_commit("org/model", [operation, add("config.json", b"{}")], commit_message="all")
    assert api.list_repo_files("org/model") == [".gitattributes"]


def test_a_commit_on_a_moved_branch_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    head = api.model_info("org/model").sha
    moved = hub.move_branch("org/model", {"new.txt": b"new"})
    with pytest.raises(HfHubHTTPError, match=r"A commit has happened since. Please refresh and try again.") as refused:
        api.create_commit("org/model", [add("config.json", b"{}")], commit_message="all", parent_commit=head)
    assert refused.value.response.status_code == 412
    assert api.model_info("org/model").sha == moved
    api.create_commit("org/model", [add("config.json", b"{}")], commit_message="all", parent_commit=moved)
    assert api.list_repo_files("org/model") == [".gitattributes", "config.json", "new.txt"]


def test_deleting_files_and_folders(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    files = [add(path, b"x") for path in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "subject.txt")]
    api.create_commit("org/model", files, commit_message="all")
    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/")]
    api.create_commit("org/model", [*gone, add("b.txt", b"y")], commit_message="less")
    assert api.list_repo_files("org/model") == [".gitattributes", "b.txt", "subject.txt"]
    assert hub.read("org/model", "b.txt") == b"y"
    for missing in ("a.txt", "sub/"):
        with pytest.raises(RemoteEntryNotFoundError, match=r"with this name doesn't exist"):
            api.create_commit("org/model", [CommitOperationDelete(missing)], commit_message="less")


def test_branches_tags_and_history(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    first = api.create_commit("org/model", [add("a.txt", b"1")], commit_message="one").oid
    api.create_branch("org/model", branch="old")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        api.create_branch("org/model", branch="old")
    api.create_branch("org/model", branch="old", exist_ok=True)
    api.create_branch("org/model", branch="feature/x", revision=first)
    api.create_tag("org/model", tag="v1", revision="old")
    second = api.create_commit("org/model", [add("a.txt", b"2")], commit_message="two").oid
    third = api.create_commit("org/model", [add("b.txt", b"")], commit_message="b", revision="feature/x").oid

    refs = api.list_repo_refs("org/model")
    heads = {"main": second, "old": first, "feature/x": third}
    assert {ref.name: ref.target_commit for ref in refs.branches} == heads
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert [(c.title, c.commit_id) for c in api.list_repo_commits("org/model")][:2] == [("two", second), ("one", first)]
    assert api.list_repo_files("org/model", revision="feature/x") == [".gitattributes", "a.txt", "b.txt"]
    assert api.model_info("org/model", revision="v1").sha == first
    with pytest.raises(BadRequestError, match="neither a branch nor a pull request"):
        api.create_commit("org/model", [add("a.txt", b"3")], commit_message="three", revision="v1")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: none"):
        api.create_commit("org/model", [add("a.txt", b"3")], commit_message="three", revision="none")
    api.delete_branch("org/model", branch="old")
    api.delete_tag("org/model", tag="v1")
    assert {*hub.repositories["org/model"].branches, *hub.repositories["org/model"].tags} == {"main", "feature/x"}


def test_a_pull_request(hub: Hub, api: HfApi) -> None:
    api.create_repo("org/model")
    api.create_commit("org/model", [add("a.txt", b"1"), add("b.txt", b"1")], commit_message="base")
    head = api.model_info("org/model").sha
    operations = [add("a.txt", b"2"), add("model.safetensors", LARGE), CommitOperationDelete("b.txt")]
    made = api.create_commit("org/model", operations, commit_message="ask", create_pr=True, parent_commit=head)
    assert (made.pr_url, made.pr_revision) == (f"{hub.url}/org/model/discussions/1", "refs/pr/1")
    assert api.model_info("org/model").sha == head
    assert api.list_repo_files("org/model", revision="refs/pr/1") == [".gitattributes", "a.txt", "model.safetensors"]
    assert hub.read("org/model", "model.safetensors", "refs/pr/1") == LARGE
    api.create_commit("org/model", [add("c.txt", b"3")], commit_message="more", revision="refs/pr/1")

    details = api.get_discussion_details("org/model", 1)
    assert (details.status, details.target_branch, details.author) == ("open", "refs/heads/main", "me")
    assert [getattr(event, "summary", None) for event in details.events] == [None, "ask", "more"]
    assert [d.title for d in api.get_repo_discussions("org/model")] == ["ask"]
    hub.move_branch("org/model", {"theirs.txt": b"t"})
    api.merge_pull_request("org/model", 1)
    assert api.get_discussion_details("org/model", 1).status == "merged"
    names = [".gitattributes", "a.txt", "c.txt", "model.safetensors", "theirs.txt"]
    assert (api.list_repo_files("org/model"), hub.read("org/model", "a.txt")) == (names, b"2")

    draft = api.create_pull_request("org/model", title="draft")
    assert (draft.num, draft.status, draft.git_reference) == (2, "draft", "refs/pr/2")
    assert api.change_discussion_status("org/model", 2, "closed").new_status == "closed"
    assert [ref.ref for ref in api.list_repo_refs("org/model", include_pull_requests=True).pull_requests or ()] == [
        "refs/pr/1",
        "refs/pr/2",
    ]


def test_a_card_without_metadata_is_noticed(api: HfApi) -> None:
    api.create_repo("org/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit("org/model", [add("README.md", b"# A model")], commit_message="card")
    with pytest.raises(ValueError, match="not closed"):
        api.create_commit("org/model", [add("README.md", b"---\nlicense: mit\n")], commit_message="card")


def test_ids_are_those_of_git(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LARGE)
    by_git = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert git_oid(LARGE) == by_git.stdout.strip()
    # the example of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    pointer = lfs_file("4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393", 12345)
    assert pointer.pointer_size == 130
