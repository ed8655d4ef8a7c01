"""Byte ranges of one file."""

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from streammerge.checkpoints.source import LocalFile
from streammerge.errors import CheckpointError, TransferError

WHERE = "model m, file f"
BYTES = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
RANGES = [(0, 0), (0, 1), (0, 10_000), (9_999, 10_000), (10_000, 10_000), (17, 4_243), (4_096, 8_192)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "f"
    path.write_bytes(BYTES.tobytes())
    return path


def read(source: LocalFile, start: int, stop: int) -> np.ndarray:
    buffer = np.full(stop - start, 7, np.uint8)
    source.read_into(buffer.data, start)
    return buffer


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_any_range_equals_a_numpy_slice(path: Path, start: int, stop: int) -> None:
    source = LocalFile(path, WHERE)
    assert source.size == len(BYTES)
    assert source.where == WHERE
    np.testing.assert_array_equal(read(source, start, stop), BYTES[start:stop])
    source.close()


@pytest.mark.parametrize("most", [1, 3, 4_096])
def test_short_reads_still_fill_the_buffer(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real, calls = os.preadv, []

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(fd, [buffers[0][:most]], offset)

    source = LocalFile(path, WHERE)
    monkeypatch.setattr(os, "preadv", short)
    np.testing.assert_array_equal(read(source, 100, 9_000), BYTES[100:9_000])
    assert calls == list(range(100, 9_000, most))
    source.close()


def test_threads_share_no_position(path: Path) -> None:
    source = LocalFile(path, WHERE)
    ranges = [(start, start + 37) for start in range(0, 9_900, 37)] * 4
    barrier = threading.Barrier(8)

    def some(part: list[tuple[int, int]]) -> list[np.ndarray]:
        barrier.wait()
        return [read(source, *bounds) for bounds in part]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(some, [ranges[i::8] for i in range(8)]))
    for i, part in enumerate(parts):
        for found, (start, stop) in zip(part, ranges[i::8], strict=True):
            np.testing.assert_array_equal(found, BYTES[start:stop])
    source.close()


def test_a_file_truncated_after_opening(path: Path) -> None:
    source = LocalFile(path, WHERE)
    os.truncate(path, 5_000)
    np.testing.assert_array_equal(read(source, 4_000, 5_000), BYTES[4_000:5_000])
    with pytest.raises(TransferError, match=f"{WHERE}: ended at byte 5000 while being read"):
        read(source, 4_000, 6_000)
    source.close()


def test_a_failing_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = LocalFile(path, WHERE)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransferError, match=f"{WHERE}: reading at byte 12: {os.strerror(errno.EIO)}") as caught:
        read(source, 12, 20)
    assert isinstance(caught.value.__cause__, OSError)
    source.close()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{WHERE}: there is no such file"):
        LocalFile(tmp_path / "none", WHERE)


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_regular_file_is_refused_and_closed(tmp_path: Path, open_fds: set[int], kind: str) -> None:
    path = tmp_path / "x"
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{WHERE}: not a regular file"):
        LocalFile(path, WHERE)
    assert not open_fds


def test_a_file_that_may_not_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TransferError, match=f"{WHERE}: cannot be opened: {os.strerror(errno.EACCES)}"):
        LocalFile(path, WHERE)


def test_close_is_final_and_may_be_repeated(path: Path, open_fds: set[int]) -> None:
    source = LocalFile(path, WHERE)
    assert len(open_fds) == 1
    source.close()
    source.close()
    assert not open_fds
    with pytest.raises(TransferError, match=WHERE):
        read(source, 0, 1)
