"""A Hub, and the real client talking to it in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from streammerge.testing import Hub

TOKEN = "hf_markerMarkerMarkerMarkerMarker12"


@pytest.fixture(autouse=True)
def _client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment would say, had the client not been imported before: no telemetry, no Xet, no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(part_bytes=1000) as running:
        yield running


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with these files."""

    def make(name: str = "model", **contents: bytes) -> Path:
        for path, content in contents.items():
            target = tmp_path / name / path.replace("__", "/").replace("_", ".")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return tmp_path / name

    return make
