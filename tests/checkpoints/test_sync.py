"""When and how what is complete becomes durable."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints.folders import content
from checkpoints.resuming import ALWAYS, FILES, NEVER, SHARDS_OF, STATE, entry, fill, finish, lines, recorded, start

from streammerge.checkpoints import shard_file, writer
from streammerge.checkpoints.journal import Journal
from streammerge.checkpoints.output import WORK_DIR
from streammerge.errors import TransferError


def test_the_bytes_are_on_disk_before_the_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, sync_seconds: Callable[[float], None]
) -> None:
    sync_seconds(NEVER)
    events: list[Any] = []
    real_sync, real_append = os.fdatasync, Journal.append

    def fdatasync(fd: int) -> None:
        real_sync(fd)
        events.append(os.fstat(fd).st_ino)

    def append(self: Journal, line: dict[str, Any]) -> None:
        events.append({"tensors": line["tensors"]})
        real_append(self, line)

    with start(out) as target:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        monkeypatch.setattr(Journal, "append", append)
        fill(target, ["a", "e"])
        assert events == []
        target.sync()
        inodes = [(out / WORK_DIR / file).stat().st_ino for file in FILES]
        kept = {name: json.loads(json.dumps(entry(name))) for name in "aeb"}
        assert events == [*inodes, {"tensors": {"a": kept["a"], "e": kept["e"]}}]
        events.clear()
        target.sync()
        assert events == []
        fill(target, ["b"])
        target.sync()
        assert events == [inodes[0], {"tensors": {"b": kept["b"]}}]


def test_complete_syncs_when_two_seconds_have_passed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(writer, "time", clock)
    with start(out) as target:
        for now, name, expected in ((1.9, "a", set()), (2.1, "b", {*"ab"}), (5.9, "d", {*"ab"}), (6.1, "e", {*"abde"})):
            if now == 5.9:
                clock.now = 4.0
                target.sync()
            clock.now = now
            fill(target, [name])
            target.wait()
            assert recorded(out) == expected, now


@pytest.mark.parametrize("steps", [(-1e6,), (1e6, -1e6), (-3.0, 0.5, -2.5)])
def test_a_clock_that_jumps_delays_no_sync(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, steps: tuple[float, ...]
) -> None:
    """Each tensor is complete after a jump that is at least two seconds from the last sync, back or forth."""
    clock = SimpleNamespace(now=1e7, monotonic=lambda: clock.now)
    monkeypatch.setattr(writer, "time", clock)
    with start(out) as target:
        for number, name in enumerate(STATE):
            clock.now += steps[number % len(steps)]
            before = clock.now
            fill(target, [name])
            target.wait()
            if abs(steps[number % len(steps)]) > 2:
                assert name in recorded(out) | {n for line in lines(out) for n in line.get("tensors", ())}, name
            assert clock.now == before
    assert finish(out) == []
    assert content(out) == whole


def test_complete_syncs_by_itself_in_a_thread_for_that(
    out: Path, monkeypatch: pytest.MonkeyPatch, sync_seconds: Callable[[float], None]
) -> None:
    threads: list[str] = []
    real = os.fdatasync
    with start(out) as target:
        monkeypatch.setattr(os, "fdatasync", lambda fd: (threads.append(threading.current_thread().name), real(fd)))
        sync_seconds(NEVER)
        fill(target, ["a", "b"])
        target.wait()
        assert lines(out) == []
        sync_seconds(ALWAYS)
        fill(target, ["e"])
        target.wait()
        assert recorded(out) == {"a", "b", "e"}
    assert threads
    assert all(name.startswith("streammerge-sync") for name in threads)


def test_a_long_hash_does_not_hold_up_the_sync(
    out: Path, monkeypatch: pytest.MonkeyPatch, sync_seconds: Callable[[float], None]
) -> None:
    monkeypatch.setattr(shard_file, "_HASH_PIECE", 10)
    sync_seconds(ALWAYS)
    real = os.pread
    found: list[set[str]] = []

    def pread(fd: int, count: int, offset: int) -> bytes:
        if not found:  # the 30 pieces of "e" have just begun
            fill(target, ["d"])
        until = time.monotonic() + 30
        while len(found) == 2 and "d" not in recorded(out):
            assert time.monotonic() < until
        found.append(recorded(out))
        return real(fd, count, offset)

    with start(out) as target:
        monkeypatch.setattr(os, "pread", pread)
        fill(target, ["e"])
        target.wait()
    assert "d" not in found[0]
    assert "d" in found[2]
    assert len(found) >= 30


def test_a_slow_disk_does_not_hold_up_the_hash(
    out: Path, monkeypatch: pytest.MonkeyPatch, sync_seconds: Callable[[float], None]
) -> None:
    sync_seconds(ALWAYS)
    real, hashed = os.fdatasync, threading.Event()
    plain = shard_file.ShardFile._read

    def read(self: shard_file.ShardFile, limit: int) -> bytes:
        if threading.current_thread().name.startswith("streammerge-hash") and self._hashed:  # the second tensor's
            hashed.set()
        return plain(self, limit)

    def slow(fd: int) -> None:
        assert hashed.wait(30)
        real(fd)

    with start(out) as target:
        monkeypatch.setattr(shard_file.ShardFile, "_read", read)
        monkeypatch.setattr(os, "fdatasync", slow)
        fill(target, SHARDS_OF[0])
        target.wait()
    assert finish(out) == [name for name in STATE if name not in SHARDS_OF[0]]


def test_sync_from_many_threads(out: Path, whole: dict[str, bytes], sync_seconds: Callable[[float], None]) -> None:
    sync_seconds(ALWAYS)

    def work(name: str) -> bool:
        fill(target, [name])
        target.sync()
        return name in recorded(out)

    with start(out) as target, ThreadPoolExecutor(len(STATE)) as pool:
        assert all(pool.map(work, STATE))
        target.wait()
        assert target.finished.keys() == set(FILES)
    assert finish(out) == []
    assert content(out) == whole


def test_each_tensor_is_in_one_line_of_tensors_at_most(out: Path, sync_seconds: Callable[[float], None]) -> None:
    sync_seconds(ALWAYS)
    with start(out) as target:
        fill(target, STATE)
        target.wait()
        named = [name for line in lines(out) if "file" not in line for name in line["tensors"]]
        assert len(named) == len(set(named))
        shards = {line["file"]: line for line in lines(out) if "file" in line}
        assert {file: sorted(line["tensors"]) for file, line in shards.items()} == {
            file: sorted(names) for file, names in zip(FILES, SHARDS_OF, strict=True)
        }
        assert all(line.keys() == {"file", "bytes", "sha256", "tensors"} for line in shards.values())


@pytest.mark.parametrize("call", ["fdatasync", "write"])
def test_nothing_is_recorded_after_a_failure(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The next fdatasync would say that all is well, and a line behind a torn one would never be read."""
    real_write = os.write

    def fail(fd: int, *data: memoryview) -> None:
        for line in data:
            real_write(fd, line[: len(line) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with start(out) as target:
        fill(target, ["a", "e"])
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(TransferError, match="cannot be made durable: Input/output error"):
                target.sync()
        fill(target, ["f"])
        with pytest.raises(TransferError, match="nothing is recorded any more after this: .*Input/output error"):
            target.sync()
    assert finish(out) == list(STATE)
    assert content(out) == whole
