"""What an earlier run left is believed only as far as it is whole: the rest is done again."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints.folders import content
from checkpoints.resuming import FILES, SHARDS_OF, STATE, fill, finish, interrupted, lines, planned, recorded, start

from streammerge.checkpoints import shard_file
from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.shard_file import ShardFile
from streammerge.errors import TransferError


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
