"""Going on after an interruption, tensor by tensor: what is complete stays, what is not is done again, and whatever
happened in between, the files end up as those of an undisturbed run.

Run as a script, this file is the process that gets killed.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors

import streammerge
from streammerge.checkpoints import shard_file, writer
from streammerge.checkpoints.journal import Journal
from streammerge.checkpoints.layout import Shard, plan_shards
from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.shard_file import ShardFile
from streammerge.checkpoints.work import WorkFolder
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError, TransferError

SIZES = {"a": 70, "b": 200, "empty": 0, "d": 150, "e": 300, "f": 9}
STATE = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDS_OF = [["a", "b", "empty", "d"], ["e", "f"]]
IDENTITY = {"seed": 0}
NEVER, ALWAYS = 1e9, -1.0  # values of SYNC_SECONDS


def planned() -> tuple[Shard, ...]:
    return plan_shards(((name, "U8", (size,)) for name, size in SIZES.items()), 420)


def start(out: Path, *, fresh: bool = False) -> CheckpointWriter:
    return CheckpointWriter(out, planned(), IDENTITY, fresh=fresh)


def entry(name: str) -> dict[str, Any]:
    return {"shape": (SIZES[name],), "norm": [1.5, None], "of": {"kept": (1, 2)}}


def fill(target: CheckpointWriter, names: Iterable[str]) -> None:
    for name in names:
        target.write(name, 0, memoryview(STATE[name]))
        target.complete(name, entry(name))


def interrupted(out: Path, names: Iterable[str]) -> None:
    """A run that stops in an orderly way after some tensors."""
    with start(out) as target:
        fill(target, names)


def finish(out: Path) -> list[str]:
    """Finish the run; the tensors that had to be written."""
    with start(out) as target:
        missing = [name for name in STATE if not target.is_complete(name)]
        assert target.entries.keys() == STATE.keys() - set(missing)
        fill(target, missing)
        target.publish({"config.json": b"{}"})
        assert target.entries == {name: json.loads(json.dumps(entry(name))) for name in STATE}
    return missing


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal after the identity, read without the code under test."""
    data = (out / WORK_DIR / "journal").read_bytes()
    return [json.loads(line[9:]) for line in data.splitlines(keepends=True)[1:] if line.endswith(b"\n")]


def recorded(out: Path) -> set[str]:
    return {name for line in lines(out) for name in line["tensors"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The folder of an undisturbed run; the library finds every tensor in it."""
    assert finish(tmp_path / "whole") == list(STATE)
    files = content(tmp_path / "whole")
    found = {name: value["data"] for file in FILES for name, value in safetensors.deserialize(files[file])}
    assert found == STATE
    return files


@pytest.fixture
def sync_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(writer, "SYNC_SECONDS", seconds)


# --- interrupted in an orderly way -------------------------------------------------------------------


class StopError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("done", range(len(STATE)))
@pytest.mark.parametrize("seed", range(2))
def test_complete_tensors_are_not_written_again(out: Path, whole: dict[str, bytes], done: int, seed: int) -> None:
    names = random.Random(seed).sample(list(STATE), len(STATE))
    with pytest.raises(StopError), start(out) as target:
        fill(target, names[:done])
        target.write(names[done], 0, memoryview(STATE[names[done]])[: SIZES[names[done]] // 2])
        raise StopError
    assert set(finish(out)) == set(names[done:])
    assert content(out) == whole


def test_interrupted_after_every_single_tensor(out: Path, whole: dict[str, bytes]) -> None:
    for count, name in enumerate(reversed(STATE)):
        with start(out) as target:
            assert len(target.entries) == count
            fill(target, [name])
    assert finish(out) == []
    assert content(out) == whole


def test_a_tensor_of_an_earlier_run_cannot_be_written_again(out: Path, whole: dict[str, bytes]) -> None:
    interrupted(out, ["b"])
    with start(out) as target:
        assert [name for name in STATE if target.is_complete(name)] == ["b"]
        with pytest.raises(RuntimeError, match="tensor 'b' is already complete"):
            target.write("b", 0, memoryview(b"x"))
        with pytest.raises(RuntimeError, match="tensor 'b' is already complete"):
            target.complete("b", {})
    assert finish(out) == [name for name in STATE if name != "b"]
    assert content(out) == whole


def test_discarding_needs_no_sync(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(out) as target:
        fill(target, ["a"])
        monkeypatch.delattr(os, "fdatasync")
        monkeypatch.delattr(os, "fsync")
        target.discard()
    assert not out.exists()


# --- what sync promises ------------------------------------------------------------------------------


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


def test_complete_syncs_by_itself_in_the_hashing_thread(
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
    assert all(name.startswith("streammerge-hash") for name in threads)


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
        found.append(recorded(out))
        return real(fd, count, offset)

    with start(out) as target:
        monkeypatch.setattr(os, "pread", pread)
        fill(target, ["e"])
        target.wait()
    assert "d" not in found[0]
    assert "d" in found[1]
    assert len(found) >= 30


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


# --- power failures and kills ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_power_fails_at_the_worst_moment(
    out: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    sync_seconds: Callable[[float], None],
    seed: int,
) -> None:
    """The disk of this test keeps the journal at once, and of a shard only what was synced: the rest reads as zeros."""
    sync_seconds(ALWAYS)
    sizes = {shard.file: shard.size for shard in planned()}
    durable: dict[str, bytes] = {}
    disks: list[dict[str, bytes]] = []
    real_sync, real_write = os.fdatasync, os.write

    def fdatasync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        durable[path.name] = path.read_bytes()
        real_sync(fd)

    def write(fd: int, data: memoryview) -> int:
        count = real_write(fd, data)
        files = {path.name: bytes(sizes[path.name]) for path in (out / WORK_DIR).glob("*.safetensors")}
        disks.append({**files, **durable, "journal": (out / WORK_DIR / "journal").read_bytes()})
        return count

    with monkeypatch.context() as patch, start(out) as target:
        patch.setattr(os, "fdatasync", fdatasync)
        patch.setattr(os, "write", write)
        for name in random.Random(seed).sample(list(STATE), len(STATE)):
            fill(target, [name])
            target.wait()
    left = []
    for number, disk in enumerate(disks):
        again = out.parent / f"again{number}"
        (again / WORK_DIR).mkdir(parents=True)
        for file, data in disk.items():
            (again / WORK_DIR / file).write_bytes(data)
        left.append(len(finish(again)))
        assert content(again) == whole, number
    assert len(set(left)) == len(STATE)
    assert sorted(left, reverse=True) == left
    assert left[-1] == 0


def child(out: Path, calls: int) -> subprocess.Popen[str]:
    """This file as a process that kills itself at its call number `calls` of a function that changes a file."""
    command = [sys.executable, __file__, str(out), str(calls)]
    path = os.pathsep.join([str(Path(streammerge.__file__).parents[1]), *filter(None, sys.path)])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)


def run_and_die(out: Path, calls: int) -> None:
    counter = iter(range(calls))

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(counter, None) is None:
                if real in (write, pwrite):
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    write, pwrite = os.write, os.pwrite
    for name in ("write", "pwrite", "fdatasync", "fsync", "replace", "posix_fallocate"):
        setattr(os, name, deadly(getattr(os, name)))
    with start(out) as target:
        for name in ("b", "e", "a", "f", "d", "empty"):
            fill(target, [name])
            target.sync()
            print(name, flush=True)
        target.publish({"config.json": b"{}"})
    print(calls - len(list(counter)))


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run changes a file."""
    report, _ = child(tmp_path_factory.mktemp("child") / "out", 10_000).communicate()
    return int(report.split()[-1])


@pytest.mark.parametrize("where", [k / 10 for k in range(10)])
def test_killed_at_a_random_moment(out: Path, whole: dict[str, bytes], calls: int, where: float) -> None:
    process = child(out, int((where + random.Random(where).random() / 10) * 0.9 * calls))  # threads vary the count
    synced = process.communicate()[0].split()
    assert process.returncode == -signal.SIGKILL
    assert not set(finish(out)) & set(synced), synced
    assert content(out) == whole


# --- what cannot be trusted --------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [1, 2, 30])
def test_a_torn_last_line_costs_its_tensors(out: Path, whole: dict[str, bytes], torn: int) -> None:
    interrupted(out, ["a"])
    interrupted(out, ["e", "b"])
    journal = out / WORK_DIR / "journal"
    os.truncate(journal, journal.stat().st_size - torn)
    assert finish(out) == [name for name in STATE if name != "a"]
    assert content(out) == whole


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extend(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [cut, extend, Path.unlink])
def test_a_shard_of_another_size_is_done_again(
    out: Path, whole: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    interrupted(out, ["a", "b", "f"])
    damage(out / WORK_DIR / FILES[0])
    assert finish(out) == ["a", "b", "empty", "d", "e"]
    assert content(out) == whole


@pytest.mark.parametrize(
    ("damage", "before"),
    [(cut, ["e"]), (Path.unlink, ["e"]), (cut, ["e", "f"]), (Path.unlink, ["e", "f"]), (flip, ["e", "f"])],
)
def test_what_was_lost_is_not_believed_once_the_file_is_there_again(
    out: Path, whole: dict[str, bytes], damage: Callable[[Path], None], before: list[str]
) -> None:
    interrupted(out, ["a", *before])
    damage(out / WORK_DIR / FILES[1])
    for _ in range(2):  # the second time the file has its full size again, and holds zeros
        with start(out) as target:
            assert target.entries.keys() == {"a"}
            target.write("e", 0, memoryview(STATE["e"])[:1])
    assert finish(out) == [name for name in STATE if name != "a"]
    assert content(out) == whole


@pytest.mark.parametrize("names", [["a", "d"], ["a", "b", "empty", "d"]])
def test_any_flipped_bit_of_what_is_complete_is_noticed(out: Path, whole: dict[str, bytes], names: list[str]) -> None:
    """In a finished shard (all of its names) as in one that is not; elsewhere nothing has been written yet."""
    interrupted(out, names)
    before = content(out)
    path = out / WORK_DIR / FILES[0]
    for info in (info for info in planned()[0].tensors if info.name in names):
        for position in range(info.start, info.stop):
            damaged = bytearray(before[f"{WORK_DIR}/{FILES[0]}"])
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with start(out) as target:
                assert target.entries == {}, (info.name, position)
            for file, data in before.items():
                (out / file).write_bytes(data)
    assert finish(out) == [name for name in STATE if name not in names]
    assert content(out) == whole


def test_a_shard_done_again_is_resumed_like_any_other(out: Path, whole: dict[str, bytes]) -> None:
    interrupted(out, ["e", "f"])
    flip(out / WORK_DIR / FILES[1])
    interrupted(out, ["f"])
    assert finish(out) == [name for name in STATE if name != "f"]
    assert content(out) == whole


def test_a_damaged_header_is_written_again(out: Path, whole: dict[str, bytes]) -> None:
    interrupted(out, ["a"])
    with (out / WORK_DIR / FILES[0]).open("r+b") as file:
        file.write(bytes(len(planned()[0].header)))
    assert finish(out) == [name for name in STATE if name != "a"]
    assert content(out) == whole


@pytest.mark.parametrize("names", [SHARDS_OF[1], list(STATE)])
def test_a_shard_complete_but_not_finished(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "hash_ahead", lambda file, between: False)
        interrupted(out, names)
    assert recorded(out) == set(names)
    assert all("file" not in line for line in lines(out))
    with start(out) as target:
        target.wait()
        assert target.finished.keys() == {file for file, held in zip(FILES, SHARDS_OF, strict=True) if held[0] in names}
    assert finish(out) == [name for name in STATE if name not in names]
    assert content(out) == whole


def test_a_shard_complete_but_not_finished_is_published_at_once(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "hash_ahead", lambda file, between: False)
        interrupted(out, STATE)
    assert finish(out) == []
    assert content(out) == whole


def test_an_interrupted_read_does_not_spoil_the_hash(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "_HASH_PIECE", 10)
    failures: Iterator[int] = iter([0, 0, 1])
    real = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        if next(failures, 0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    with start(out) as target:
        fill(target, ["e"])
        with pytest.raises(TransferError, match="reading back at byte"):
            target.wait()
        fill(target, [name for name in STATE if name != "e"])
        target.publish({"config.json": b"{}"})
        for file, line in target.finished.items():
            assert line["sha256"] == hashlib.sha256(whole[file]).hexdigest()


# --- one writer at a time ----------------------------------------------------------------------------

BUSY = "out is being written by another process: wait for it, or choose another --out"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_writer_is_refused_and_disturbs_nothing(
    out: Path, whole: dict[str, bytes], open_fds: set[int], fresh: bool
) -> None:
    with start(out) as target:
        fill(target, ["a", "e", "f"])
        target.sync()
        target.wait()
        before, held = content(out), set(open_fds)
        with pytest.raises(OutputExistsError, match=BUSY):
            start(out, fresh=fresh)
        assert content(out) == before
        assert open_fds == held
        fill(target, ["b", "empty", "d"])
        target.publish({"config.json": b"{}"})
    assert content(out) == whole
    assert not open_fds


def test_the_lock_ends_with_the_writer(out: Path) -> None:
    with start(out), pytest.raises(OutputExistsError):
        start(out)
    with pytest.raises(OutputExistsError, match="differs in seed"):  # refused after it was locked
        CheckpointWriter(out, planned(), {"seed": 1})
    with start(out) as target:
        target.discard()
    finish(out)
    with start(out, fresh=True):
        pass


def test_the_lock_ends_with_its_process(out: Path, whole: dict[str, bytes]) -> None:
    process = child(out, -1)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    with pytest.raises(OutputExistsError, match=BUSY):
        start(out)
    process.kill()
    process.communicate()
    assert finish(out) == ["b", "empty", "d", "e", "f"]
    assert content(out) == whole


def test_no_two_writers_get_in_while_folders_come_and_go(out: Path) -> None:
    inside: set[int] = set()
    entered: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            try:
                folder = WorkFolder(out, fresh=number % 2 == 0)
            except (OutputExistsError, FileNotFoundError, FileExistsError):  # busy, or just being removed
                continue
            inside.add(number)
            entered.append(len(inside))
            (folder.path / "shard").touch()
            inside.discard(number)
            folder.remove()
            folder.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert set(entered) == {1}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_all_the_same(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    finish(out)
    assert content(out) == whole


def hold(out: Path) -> None:
    with start(out) as target:
        fill(target, ["a"])
        target.sync()
        print("holding", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    out_folder, number_of_calls = Path(sys.argv[1]), int(sys.argv[2])
    run_and_die(out_folder, number_of_calls) if number_of_calls >= 0 else hold(out_folder)
