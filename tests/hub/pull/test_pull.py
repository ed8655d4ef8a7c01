"""Checkpoints from the Hub against the same folders on disk: what is fetched, when, and where it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.pull.conftest import TOKEN
from huggingface_hub import constants

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.locate import open_model
from streammerge.checkpoints.weight_files import INDEX_FILE
from streammerge.errors import CheckpointError, RecipeError, TransferError
from streammerge.hub import downloads, tries
from streammerge.hub.pull import HubMode
from streammerge.testing import Fault, Hub

Open = Callable[..., Checkpoint]
MODES: tuple[HubMode, ...] = ("cache", "stream")
Pair = tuple[Path, Path]


@pytest.fixture
def opened(client: Path) -> Iterator[Open]:
    checkpoints: list[Checkpoint] = []

    def call(reference: str = "org/base", mode: HubMode = "stream") -> Checkpoint:
        checkpoints.append(open_model(reference, mode))
        return checkpoints[-1]

    yield call
    for checkpoint in checkpoints:
        checkpoint.close()


@pytest.fixture
def local(pair: Pair) -> Iterator[Checkpoint]:
    with Checkpoint.open(pair[0]) as checkpoint:
        yield checkpoint


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_the_hub_is_the_model_in_the_folder(
    opened: Open, hub: Hub, local: Checkpoint, mode: HubMode
) -> None:
    found = opened(mode=mode)
    commit = hub.repositories["org/base"].branches["main"]
    assert (found.id, found.revision, found.folder) == ("org/base", commit, None)
    assert found.config == local.config
    assert list(found.tensors.items()) == list(local.tensors.items())
    assert len({info.file for info in found.tensors.values()}) == 5
    assert found.fingerprint() == local.fingerprint()
    for name in local.tensors:
        assert torch.equal(found.tensor(name), local.tensor(name))
    assert list(found.side_files()) == list(local.side_files()) == ["LICENSE", "config.json", *TOKENIZER, NOTES]
    for name in found.side_files():
        assert found.files.path(name).read_bytes() == local.files.path(name).read_bytes()


TOKENIZER, NOTES = ["notes/history.txt"], "tokenizer.json"


def test_opening_fetches_headers_index_and_config_alone(
    opened: Open, hub: Hub, pair: Pair, client: Path, local: Checkpoint
) -> None:
    found = opened(mode="cache")
    small = sum((pair[0] / name).stat().st_size for name in ("config.json", INDEX_FILE))
    headers = sum(min(i.start for i in local.tensors.values() if i.file == file) for file in weights(local))
    served = {name: of_file.served for name, of_file in hub.traffic("file").items()}
    assert {name.split("/")[-1] for name in served} == {"config.json", INDEX_FILE, *weights(local)}
    assert headers + small <= sum(served.values()) <= 1.25 * headers + small
    listing = hub.traffic()["info"]
    assert listing.requests == 1
    assert found.files.transferred == sum(served.values()) + listing.served
    assert {
        (name, of_file.requests) for name, of_file in hub.traffic("file").items() if name.endswith("safetensors")
    } == {(f"org/base/{file}", 2) for file in weights(local)}, "a redirect, and the header in one piece"
    assert not client.exists()


def weights(checkpoint: Checkpoint) -> list[str]:
    return sorted({info.file for info in checkpoint.tensors.values()})


def test_a_fingerprint_is_announced_and_downloads_nothing(opened: Open, client: Path, local: Checkpoint) -> None:
    for mode in MODES:
        found = opened(mode=mode)
        before, announced = found.files.transferred, found.fingerprint_bytes()
        assert found.fingerprint() == local.fingerprint()
        assert found.files.transferred - before == announced > 0
        assert found.fingerprint() == local.fingerprint()
        assert found.files.transferred - before == announced, "once is enough"
    assert not client.exists()
    assert local.fingerprint_bytes() == 0


def test_streaming_writes_nothing_into_the_cache(opened: Open, client: Path) -> None:
    found = opened()
    for name in found.tensors:
        found.tensor(name)
    folder = found.files.folder_with("*.json")
    assert files_of(folder) == ["config.json", "tokenizer.json"]
    for name in found.side_files():
        assert folder in found.files.path(name).parents
    assert not client.exists()
    found.close()
    assert not folder.exists()
    assert all(found.is_streamed(info) for info in found.tensors.values())
    assert found.missing_bytes == 0


def test_downloads_are_one_ahead_and_in_order(
    opened: Open, client: Path, local: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    plain = downloads.Downloads._download

    def watched(self: Any, name: str) -> Path:
        begun.append(name)
        return plain(self, name)

    monkeypatch.setattr(downloads.Downloads, "_download", watched)
    found = opened(mode="cache")
    files = weights(local)
    assert found.missing_bytes == sum((local.folder or Path()).joinpath(file).stat().st_size for file in files)
    for number, file in enumerate(files):
        for name, info in local.tensors.items():
            if info.file == file:
                assert torch.equal(found.tensor(name), local.tensor(name))
        for thread in threading.enumerate():
            if thread.name == "streammerge-download":
                thread.join()
        assert [name for name in begun if name in files] == files[: number + 2]
    assert found.missing_bytes == 0
    assert not any(found.is_streamed(info) for info in found.tensors.values())
    snapshot = next((client / "models--org--base" / "snapshots").iterdir())
    assert files_of(snapshot) == sorted(["config.json", "tokenizer.json", INDEX_FILE, *files])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_in_the_cache_is_not_asked_for(
    opened: Open, hub: Hub, local: Checkpoint, mode: HubMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(mode="cache")
    for name in (*found.tensors, *found.side_files()):
        _ = found.tensor(name) if name in found.tensors else found.files.path(name)
    hub.record.clear()
    again = opened(mode=mode)
    assert [exchange.endpoint for exchange in hub.record] == ["info"]
    assert again.fingerprint_bytes() == again.missing_bytes == 0
    assert again.fingerprint() == local.fingerprint()
    assert [again.files.path(name).read_bytes() for name in again.side_files()] == [
        local.files.path(name).read_bytes() for name in local.side_files()
    ]
    assert len(hub.record) == 1

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for reference in ("org/base", f"org/base@{found.revision}"):
        offline = opened(reference, mode)
        assert (offline.revision, offline.fingerprint()) == (found.revision, local.fingerprint())
        assert list(offline.side_files()) == list(local.side_files())
    assert len(hub.record) == 1


def test_a_hub_that_does_not_answer_leaves_what_the_cache_has(
    opened: Open, hub: Hub, local: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(mode="cache")
    for name in found.tensors:
        found.tensor(name)
    hub.misbehave(Fault("status", times=None))
    assert opened(mode="cache").fingerprint() == local.fingerprint()
    with pytest.raises(TransferError, match=r"model org/ft: not in the local cache, and the Hub .*answered 503"):
        opened("org/ft")


def test_part_of_a_model_in_the_cache(opened: Open, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(mode="cache")
    found.tensor(next(iter(found.tensors)))
    wait_for_downloads()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    third = weights(found)[2]
    with pytest.raises(TransferError, match=f"model org/base, file {third}: not in the local cache, and the Hub"):
        opened()
    with pytest.raises(TransferError, match="model org/ft: not in the local cache, and the Hub cannot be reached"):
        opened("org/ft")


def wait_for_downloads() -> None:
    for thread in threading.enumerate():
        if thread.name == "streammerge-download":
            thread.join()


@pytest.mark.parametrize("mode", MODES)
def test_the_commit_is_pinned(opened: Open, hub: Hub, local: Checkpoint, mode: HubMode) -> None:
    found = opened(mode=mode)
    files = dict.fromkeys(weights(local), b"other weights")
    hub.move_branch("org/base", {**files, "config.json": b"{}", "LICENSE": b"none", "tokenizer.json": b"{}"})
    assert found.fingerprint() == local.fingerprint()
    for name in local.tensors:
        assert torch.equal(found.tensor(name), local.tensor(name))
    assert found.files.path("LICENSE").read_bytes() == b"licence of the base\n"
    assert (found.files.folder_with("tokenizer.json") / "tokenizer.json").stat().st_size > 2
    wait_for_downloads()
    resolved = {exchange.path.split("/")[4] for exchange in hub.record if exchange.endpoint == "resolve"}
    assert resolved == {found.revision}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["status", "rate_limit", "reset", "short_body"])
def test_downloads_survive_what_passes(opened: Open, hub: Hub, local: Checkpoint, kind: Any, mode: HubMode) -> None:
    for path in ("/api/models/*", "*/config.json", "*/model-0000[1-5]*", "*/LICENSE"):
        hub.misbehave(Fault(kind, path=path, nbytes=20, times=2))
    found = opened(mode=mode)
    for name in local.tensors:
        assert torch.equal(found.tensor(name), local.tensor(name))
    assert found.files.path("LICENSE").read_bytes() == b"licence of the base\n"


def test_a_download_that_does_not_succeed(opened: Open, hub: Hub) -> None:
    found = opened(mode="cache")
    hub.misbehave(Fault("status", path="/download/*/model-00001-of-00005.safetensors", times=None))
    with pytest.raises(TransferError) as caught:
        found.tensor(next(iter(found.tensors)))
    assert str(caught.value) == (
        "model org/base, file model-00001-of-00005.safetensors: the server answered 503; "
        f"tried {tries.TRIES} times, run again to go on"
    )


def test_a_cache_that_cannot_be_written(opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    found = opened(mode="cache")
    with pytest.raises(TransferError, match=r"cannot be written into the Hub's cache \(Not a directory\): set HF_HOME"):
        found.tensor(next(iter(found.tensors)))
    assert opened(mode="stream").tensor("model.norm.weight").shape == (64,)


def test_who_may_not_see_it(opened: Open, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/ft"].gated = True
    hub.repositories["org/ft"].private = False
    with pytest.raises(
        CheckpointError, match="model org/ft: gated: ask for access on its page, as whom you are logged"
    ):
        opened("org/ft")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: None)
        patch.setenv("HF_TOKEN", "")
        with pytest.raises(CheckpointError, match="gated: ask for access on its page, then `hf auth login`"):
            opened("org/ft")
    with pytest.raises(CheckpointError, match="model org/base@v9: the repository has no such revision"):
        opened("org/base@v9")
    monkeypatch.setenv("HF_TOKEN", "hf_someoneElses")
    with pytest.raises(CheckpointError, match="model org/base: .*`hf auth login`") as caught:
        opened()
    assert "hf_someoneElses" not in str(caught.value) and TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(CheckpointError, match="model org/base: no such folder here and no such repository on the Hub"):
        opened()


def test_what_is_no_hub(opened: Open, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/org/base/resolve/main/LICENSE?")
    with pytest.raises(CheckpointError, match="model org/base: what answers there is no Hub: is HF_ENDPOINT right"):
        opened()


def test_a_mode_that_there_is_not(pair: Pair) -> None:
    for reference in ("org/base", str(pair[0])):
        with pytest.raises(RecipeError, match="--hub-mode: there is no 'steam': did you mean 'stream'"):
            open_model(reference, "steam")
