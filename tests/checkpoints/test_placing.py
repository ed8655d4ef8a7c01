"""Nothing half-done loads: not before a checkpoint is published, nor while it replaces another, nor after a kill."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints.folders import content, top_level
from checkpoints.writing import (
    FILES,
    IDENTITY,
    LIMIT,
    OTHER,
    SHARDS_OF,
    STATE,
    Killed,
    bits,
    fill,
    kill_at,
    loads,
    others,
    planned,
    run,
)

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint
from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import CheckpointError, TransferError

# --- nothing half-done looks done -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_nothing_is_loadable_before_publish(out: Path, limit: int) -> None:
    shards = planned(STATE, limit)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        for name in STATE:
            fill(writer, STATE, [name])
            assert top_level(out) == {WORK_DIR}
            with pytest.raises(CheckpointError, match="no safetensors file"):
                Checkpoint.open(out)
        writer.publish(others(shards))
    assert WORK_DIR not in top_level(out)
    Checkpoint.open(out).close()


def test_publish_refuses_an_incomplete_run(out: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE, SHARDS_OF[0] + SHARDS_OF[2][:1])
        with pytest.raises(RuntimeError, match=f"{FILES[1]} is not complete"):
            writer.publish({})
    assert top_level(out) == {WORK_DIR}


@pytest.mark.parametrize(("limit", "last"), [(LIMIT, INDEX_FILE), (10**9, SINGLE_FILE)])
def test_what_makes_the_folder_loadable_is_moved_last(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, last: str
) -> None:
    real, moved = os.replace, []

    def record(source: Path, target: Path) -> None:
        moved.append(str(target.relative_to(out)))
        real(source, target)

    monkeypatch.setattr(os, "replace", record)
    run(out, limit=limit)
    assert moved[-2:] == [MANIFEST_FILE, last]
    assert sorted(moved) == sorted(content(out))


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_every_file_is_on_disk_before_it_moves_and_the_folder_after(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    real_replace = os.replace
    synced: list[int] = []  # inodes
    at_move: dict[int, list[int]] = {}

    def recording(real: Callable[[int], None]) -> Callable[[int], None]:
        return lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1]

    def replace(source: Path, target: Path) -> None:
        at_move[source.stat().st_ino] = [*synced]
        real_replace(source, target)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    monkeypatch.setattr(os, "replace", replace)
    run(out, limit=limit)
    assert at_move.keys() == {path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert all(inode in before for inode, before in at_move.items())
    last, one_but_last = at_move.popitem()[1], at_move.popitem()[1]
    assert out.stat().st_ino in last[len(one_but_last) :]  # the others have their names when the index gets its own
    assert synced[-1] == out.stat().st_ino
    assert len(synced) > len(last)


# --- overwrite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, LIMIT, 10**9])
def test_overwriting_leaves_nothing_of_the_old(out: Path, expected: dict[str, bytes], limit: int) -> None:
    run(out, OTHER, limit)
    run(out, fresh=True)
    assert content(out) == expected


@pytest.mark.parametrize(("limit", "first"), [(LIMIT, INDEX_FILE), (10**9, SINGLE_FILE)])
def test_what_makes_the_old_loadable_is_removed_first(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, first: str
) -> None:
    run(out, OTHER, limit)
    old = set(content(out))
    real, removed = os.unlink, []

    def record(path: Path) -> None:
        if path.parent != out / WORK_DIR:
            removed.append(str(path.relative_to(out)))
        real(path)

    monkeypatch.setattr(os, "unlink", record)
    run(out, fresh=True)
    assert removed[0] == first
    assert removed[-1] == MANIFEST_FILE
    assert set(removed) == old


def test_overwriting_leaves_the_old_alone_until_publish(out: Path) -> None:
    run(out, OTHER)
    before = content(out)
    with CheckpointWriter(out, planned(STATE), IDENTITY, fresh=True) as writer:
        fill(writer, STATE)
        assert {name: data for name, data in content(out).items() if not name.startswith(WORK_DIR)} == before
        writer.discard()
    assert content(out) == before


# --- killed while publishing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "call"), [(LIMIT, k) for k in range(7)] + [(10**9, k) for k in range(4)])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, os.strerror(errno.EIO))])
def test_killed_at_any_move_then_run_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, call: int, error: BaseException
) -> None:
    run(out.parent / "whole", limit=limit)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", call, error)
        with pytest.raises((Killed, TransferError), match=None if isinstance(error, Killed) else "moving the finished"):
            run(out, limit=limit)
    assert loads(out) is None
    assert WORK_DIR in top_level(out)
    shards = planned(STATE, limit)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        assert set(writer.finished) == {shard.file for shard in shards}  # nothing is computed twice
    run(out, limit=limit)
    assert content(out) == content(out.parent / "whole")


def test_there_is_no_move_beyond_those_killed_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, moves in ((LIMIT, 7), (10**9, 4)):
        with monkeypatch.context() as patch:
            kill_at(patch, os, "replace", moves, Killed())
            run(tmp_path / f"out{limit}", limit=limit)


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_killed_before_the_work_folder_is_removed(out: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    run(out.parent / "whole", limit=limit)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "rmdir", 0, Killed())
        with pytest.raises(Killed):
            run(out, limit=limit)
    assert loads(out) == bits(STATE)
    run(out, limit=limit)
    assert content(out) == content(out.parent / "whole")


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_killed_again_at_any_move_after_all_had_moved(out: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The next run moves the other files once more: until then nothing loads without them."""
    run(out.parent / "whole", limit=limit)
    whole = content(out.parent / "whole")
    for call in range(5):
        with monkeypatch.context() as patch:
            kill_at(patch, disk, "remove_tree", 0, Killed())
            with pytest.raises(Killed):
                run(out, limit=limit)
        with monkeypatch.context() as patch:
            kill_at(patch, os, "replace", call, Killed())
            with suppress(Killed):
                run(out, limit=limit)
        seen = {name: data for name, data in content(out).items() if not name.startswith(WORK_DIR)}
        assert loads(out) is None or seen == whole
        if (out / WORK_DIR).exists():  # there are not so many moves
            run(out, limit=limit)
        assert content(out) == whole
        shutil.rmtree(out)


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
@pytest.mark.parametrize(
    ("name", "call"), [*(("unlink", k) for k in range(5)), *(("replace", k) for k in range(4)), ("rmdir", 0)]
)
@pytest.mark.parametrize("fresh", [False, True])
def test_killed_while_replacing_an_older_merge(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, name: str, call: int, fresh: bool
) -> None:
    run(out.parent / "whole", limit=limit, seed=1)
    run(out, OTHER)
    with monkeypatch.context() as patch:
        kill_at(patch, os, name, call, Killed())
        with pytest.raises(Killed):
            run(out, limit=limit, fresh=True, seed=1)
    assert loads(out) in (None, bits(OTHER), bits(STATE))  # never a mixture
    run(out, limit=limit, fresh=fresh, seed=1)
    assert loads(out) == bits(STATE)
    assert content(out) == content(out.parent / "whole")
