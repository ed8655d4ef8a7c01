"""The real client looks at repositories and downloads; a plain client asks for ranges."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile, RepoFolder
from safetensors.torch import save_file

from streammerge.testing import Hub

WEIGHTS = Random(3).randbytes(5000)
CONTENT = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub__deep__notes.txt": b"notes", "empty.txt": b""}
PATHS = ["config.json", "empty.txt", "model.safetensors", "sub/deep/notes.txt"]
Folder = Callable[..., Path]


@pytest.fixture
def commit(hub: Hub, folder: Folder) -> str:
    """The commit of a repository with four files."""
    return hub.add("org/model", folder(**{k.replace(".", "_"): v for k, v in CONTENT.items()}))


def test_model_info(hub: Hub, api: HfApi, commit: str) -> None:
    info = api.model_info("org/model", files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == ("org/model", "org", commit, False, False)
    files = {file.rfilename: file for file in info.siblings or ()}
    assert list(files) == PATHS
    weights = files["model.safetensors"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (5000, hashlib.sha256(WEIGHTS).hexdigest())
    assert (files["config.json"].size, files["config.json"].lfs) == (2, None)
    assert files["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    assert [file.size for file in api.model_info("org/model").siblings or ()] == [None] * 4
    assert api.resolve_revision("org/model").resolved == commit
    assert api.whoami()["name"] == "me"


def test_a_revision_is_a_branch_a_commit_or_refused(hub: Hub, api: HfApi, commit: str) -> None:
    moved = hub.move_branch("org/model", {"config.json": b'{"a": 1}'})
    assert api.model_info("org/model").sha == moved
    assert api.model_info("org/model", revision=commit).sha == commit
    assert hub.read("org/model", "config.json", commit) == b"{}"
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model", revision="nowhere")


@pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
def test_the_tree_comes_in_pages(hub: Hub, api: HfApi, commit: str, page_size: int) -> None:
    hub.page_size = page_size
    entries = list(api.list_repo_tree("org/model", recursive=True, expand=True))
    assert [e.path for e in entries] == [*PATHS[:3], "sub", "sub/deep", "sub/deep/notes.txt"]
    assert [type(e) for e in entries] == [RepoFile] * 3 + [RepoFolder] * 2 + [RepoFile]
    last = {e.last_commit.oid for e in entries if isinstance(e, RepoFile) and e.last_commit}
    assert last == {commit}
    assert hub.traffic()["tree"].requests == -(-6 // page_size)
    assert [e.path for e in api.list_repo_tree("org/model")] == [*PATHS[:3], "sub"]
    assert [e.path for e in api.list_repo_tree("org/model", "sub/deep")] == ["sub/deep/notes.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/model", "nowhere"))


def test_paths_info(api: HfApi, commit: str) -> None:
    found = api.get_paths_info("org/model", ["model.safetensors", "sub", "nowhere"])
    assert [(type(e), e.path) for e in found] == [(RepoFile, "model.safetensors"), (RepoFolder, "sub")]


@pytest.mark.parametrize("redirects", [True, False])
def test_snapshot_download(hub: Hub, commit: str, tmp_path: Path, redirects: bool) -> None:
    hub.redirects = redirects
    folder = Path(snapshot_download("org/model", endpoint=hub.url, token="hf_x", cache_dir=tmp_path / "cache"))
    assert folder.name == commit
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {path.replace("__", "/"): content for path, content in CONTENT.items()}
    files = hub.traffic("file")
    assert {path: files[f"org/model/{path}"].served for path in PATHS} == {path: len(found[path]) for path in PATHS}
    storage = [(e.endpoint, e.authorization, e.served) for e in hub.record if e.host == "storage"]
    assert storage == ([("download", None, 5000)] if redirects else [])
    assert {authorization for _, _, authorization in hub.requests} == {"Bearer hf_x"}


def test_hf_hub_download_of_a_pinned_file(hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.move_branch("org/model", {"config.json": b'{"a": 1}'})

    def read(revision: str | None) -> bytes:
        where = {"endpoint": hub.url, "cache_dir": tmp_path, "revision": revision}
        return Path(hf_hub_download("org/model", "config.json", **where)).read_bytes()

    assert (read(None), read(commit)) == (b'{"a": 1}', b"{}")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/model", "nowhere.json", endpoint=hub.url, cache_dir=tmp_path)


def test_safetensors_metadata(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7)}, tmp_path / "weights" / "model.safetensors")
    hub.add("org/weights", tmp_path / "weights")
    metadata = api.get_safetensors_metadata("org/weights")
    tensors = metadata.files_metadata["model.safetensors"].tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"a": (3, 5), "b": (7,)}


RANGES = {
    "bytes=0-9": (206, (0, 10)),
    "bytes=10-10": (206, (10, 11)),
    "bytes=4990-": (206, (4990, 5000)),
    "bytes=4990-9999": (206, (4990, 5000)),
    "bytes=-3": (206, (4997, 5000)),
    "bytes=-9999": (206, (0, 5000)),
    "bytes=5000-": (416, None),
    "bytes=7000-8000": (416, None),
    "bytes=0-1,4-5": (200, (0, 5000)),
    "lines=1-2": (200, (0, 5000)),
}


@pytest.mark.parametrize("redirects", [True, False])
@pytest.mark.parametrize("header", RANGES)
def test_ranges(hub: Hub, commit: str, header: str, redirects: bool) -> None:
    hub.redirects = redirects
    status, span = RANGES[header]
    url = f"{hub.url}/org/model/resolve/{commit}/model.safetensors"
    with httpx2.Client(follow_redirects=True, trust_env=False) as client:
        answer = client.get(url, headers={"Range": header})
    assert answer.status_code == status
    if span is None:
        assert (answer.headers["Content-Range"], answer.content) == ("bytes */5000", b"")
        return
    start, stop = span
    assert answer.content == WEIGHTS[start:stop]
    assert answer.headers.get("Content-Range") == (f"bytes {start}-{stop - 1}/5000" if status == 206 else None)
    assert hub.traffic("file")["org/model/model.safetensors"].served == stop - start
    assert [e.range for e in hub.record] == [header] * (2 if redirects else 1)


def test_head_says_what_the_client_needs(hub: Hub, commit: str) -> None:
    with httpx2.Client(trust_env=False) as client:
        weights = client.head(f"{hub.url}/org/model/resolve/main/model.safetensors")
        config = client.head(f"{hub.url}/org/model/resolve/main/config.json")
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.status_code, weights.headers["X-Linked-Size"]) == (302, "5000")
    assert (weights.headers["X-Linked-Etag"], weights.headers["X-Repo-Commit"]) == (f'"{digest}"', commit)
    assert weights.headers["Location"].startswith(f"{hub.storage_url}/download/org/model/")
    assert (config.status_code, config.headers["Content-Length"], config.headers["Accept-Ranges"]) == (
        200,
        "2",
        "bytes",
    )
    assert config.headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'
    assert [e.served for e in hub.record] == [0, 0]


def test_signed_urls_expire_and_cannot_be_made_up(hub: Hub, commit: str) -> None:
    with httpx2.Client(trust_env=False) as client:

        def location() -> str:
            return client.head(f"{hub.url}/org/model/resolve/main/model.safetensors").headers["Location"]

        good = location()
        assert client.get(good).content == WEIGHTS
        for bad in (
            good.partition("?")[0],
            good.replace("Signature=", "Signature=0"),
            good.replace("Expires=", "Expires=9"),
        ):
            assert client.get(bad).status_code == 403
        hub.expire_links()
        assert client.get(good).status_code == 403
        hub.link_seconds = -1.0
        refused = client.get(location())
        assert (refused.status_code, "expired" in refused.text) == (403, True)
