"""Builders shared by the tests of `streammerge.checkpoints`."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
from checkpoints import folders, resuming, writing

from streammerge.checkpoints import writer

Content = bytes | dict[str, Any]


def safetensors_bytes(header: Content, data: bytes = b"") -> bytes:
    """A safetensors file around any header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def raw_file() -> Callable[..., bytes]:
    return safetensors_bytes


@pytest.fixture
def tiny() -> Callable[..., bytes]:
    """A valid file with the named tensors, one float32 each."""

    def build(*names: str) -> bytes:
        entries = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
        }
        return safetensors_bytes(entries, struct.pack(f"<{len(names)}f", *range(len(names))))

    return build


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write files (bytes, or JSON) into a model folder; `config.json` comes by itself."""

    def build(files: Mapping[str, Content], folder: str = "model") -> Path:
        root = tmp_path / folder
        root.mkdir()
        for name, content in {"config.json": {"model_type": "tiny"}, **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return root

    return build


@pytest.fixture
def open_fds(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The descriptors that `os.open` gave out and nobody closed yet."""
    real_open, real_close = os.open, os.close
    held: set[int] = set()

    def tracked_open(*args: Any, **kwargs: Any) -> int:
        fd = real_open(*args, **kwargs)
        held.add(fd)
        return fd

    def tracked_close(fd: int) -> None:
        held.discard(fd)
        real_close(fd)

    monkeypatch.setattr(os, "open", tracked_open)
    monkeypatch.setattr(os, "close", tracked_close)
    return held


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The folder of an uninterrupted run of `writing`."""
    writing.run(tmp_path / "expected")
    return folders.content(tmp_path / "expected")


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The folder of an undisturbed run of `resuming`; the library finds every tensor in it."""
    assert resuming.finish(tmp_path / "whole") == list(resuming.STATE)
    files = folders.content(tmp_path / "whole")
    found = {name: value["data"] for file in resuming.FILES for name, value in safetensors.deserialize(files[file])}
    assert found == resuming.STATE
    return files


@pytest.fixture
def sync_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(writer, "SYNC_SECONDS", seconds)
