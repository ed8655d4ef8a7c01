"""One writer at a time: the lock of the work folder."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints.doomed import child
from checkpoints.folders import content
from checkpoints.resuming import fill, finish, planned, start

from streammerge.checkpoints.work import WorkFolder
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError

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
