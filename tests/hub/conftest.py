"""The real client in this process, talking to a loopback Hub; and a merge to push."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from hub.pushing import TOKEN, USERS, Merge, folder_content, recipe
from huggingface_hub import close_session
from huggingface_hub.utils import _http
from tiny_models import Models

import streammerge
from streammerge.hub import refusals
from streammerge.testing import Hub


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client hands a file to its HTTP library in a way that this one calls old."""
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose address the client takes for the real one's; without Xet."""
    close_session()
    with Hub(USERS) as running:
        for name, value in {
            "ENDPOINT": running.url,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_ASSETS_CACHE": str(tmp_path / "assets"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
        close_session()


@pytest.fixture(autouse=True)
def no_address_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The client logs every try of its own, with the address it asked; those of weights are signed."""
    yield
    told = [record.getMessage() for record in caplog.get_records("call") if record.name.startswith("huggingface_hub")]
    assert not [message for message in told if "://" in message or "/upload" in message]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two attempts."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.001)))
    monkeypatch.setattr(refusals, "_FIRST_WAIT", 0.001)


@pytest.fixture
def merge(saved_models: Models) -> Merge:
    """Merge the tiny pair; values of the recipe and options of the call by name."""

    def call(out: Path | None = None, push: Any = None, **options: Any) -> dict[str, Any]:
        fields = {key: options.pop(key) for key in [*options] if key in streammerge.Recipe.model_fields}
        return streammerge.merge(recipe(saved_models, **fields), out, push_to_hub=push, threads=1, **options)

    return call


@pytest.fixture(scope="session")
def local(saved_models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a merge that never saw a Hub."""
    out = tmp_path_factory.mktemp("local") / "merged"
    streammerge.merge(recipe(saved_models), out)
    return folder_content(out)
