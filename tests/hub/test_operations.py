"""What is used of the client beyond its documented calls: these tests fail where it moves."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import HfApi, close_session, get_session, set_client_factory
from huggingface_hub.utils import _http
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from streammerge.hub.operations import (
    file_operation,
    is_ignored,
    is_uploaded,
    limit_waiting,
    missing_objects,
    quiet_client,
    uploaded_operation,
)
from streammerge.testing import Hub

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "model-00001-of-00002.safetensors"


@pytest.fixture
def api(hub: Hub) -> HfApi:
    api = HfApi()
    api.create_repo("org/new")
    return api


def state(operation: Any) -> dict[str, Any]:
    """All there is to an operation, but what the commit does not look at: the bytes' first 512, and their path."""
    values = {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
    info = vars(values.pop("upload_info"))
    return values | {key: value for key, value in info.items() if key not in ("sample", "_source_path")}


def test_an_operation_made_anew_is_the_one_the_client_keeps(api: HfApi, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    kept = huggingface_hub.CommitOperationAdd(NAME, path)
    api.preupload_lfs_files("org/new", [kept])
    assert kept.path_or_fileobj == b""
    assert state(uploaded_operation(NAME, len(CONTENT), SHA256)) == state(kept)


def test_an_operation_made_anew_is_committed(api: HfApi, hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    first = file_operation(NAME, path, SHA256)
    assert first.upload_info.is_hashed and not is_uploaded(first) and not is_ignored(first)
    api.preupload_lfs_files("org/new", [first])
    assert is_uploaded(first) and not is_ignored(first)
    sent = hub.traffic()["upload"].received
    api.create_commit("org/new", [uploaded_operation(NAME, len(CONTENT), SHA256)], commit_message="again")
    assert hub.read("org/new", NAME) == CONTENT
    assert hub.traffic()["upload"].received == sent == len(CONTENT)


def test_a_small_text_is_not_uploaded(api: HfApi) -> None:
    operation = file_operation("config.json", b"{}")
    api.preupload_lfs_files("org/new", [operation])
    assert not is_uploaded(operation)


def test_missing_objects(api: HfApi, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.hub.operations._BATCH", 2)
    api.preupload_lfs_files("org/new", [file_operation(NAME, CONTENT)])
    objects = {f"other-{number}": (5, f"{number:064x}") for number in range(3)} | {NAME: (len(CONTENT), SHA256)}
    assert missing_objects("org/new", hub.url, objects) == ["other-0", "other-1", "other-2"]
    assert missing_objects("org/new", hub.url, {}) == []
    hub.lose_object("org/new", SHA256)
    assert missing_objects("org/new", hub.url, {NAME: (len(CONTENT), SHA256)}) == [NAME]


def test_the_clients_bars_come_back() -> None:
    assert not are_progress_bars_disabled()
    with quiet_client():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()


def test_bars_that_the_user_insists_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", False)
    with quiet_client():
        assert not are_progress_bars_disabled()


def test_waiting_has_an_end(hub: Hub) -> None:
    assert get_session().timeout == httpx2.Timeout(None)  # as the client has it; else this is not needed any more
    limit_waiting((1, 2, 3))
    assert get_session().timeout == httpx2.Timeout(connect=1, read=2, write=3, pool=None)
    limit_waiting((4, 5, 6))
    assert get_session().timeout.read == 2


def test_limits_of_the_user_stay(hub: Hub) -> None:
    set_client_factory(lambda: httpx2.Client(timeout=7))
    try:
        limit_waiting((1, 2, 3))
        assert get_session().timeout == httpx2.Timeout(7)
    finally:
        set_client_factory(_http.default_client_factory)
        close_session()
