"""Going on after an interruption, tensor by tensor: what is complete stays, what is not is done again, and whatever
happened in between, the files end up as those of an undisturbed run.
"""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints.doomed import child
from checkpoints.folders import content
from checkpoints.resuming import ALWAYS, SIZES, STATE, fill, finish, interrupted, planned, start

from streammerge.checkpoints.output import WORK_DIR

# --- interrupted in an orderly way ------------------------------------------------------------------------------------


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
            target.complete("b", {}, [])
    assert finish(out) == [name for name in STATE if name != "b"]
    assert content(out) == whole


def test_discarding_needs_no_sync(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(out) as target:
        fill(target, ["a"])
        monkeypatch.delattr(os, "fdatasync")
        monkeypatch.delattr(os, "fsync")
        target.discard()
    assert not out.exists()


# --- power failures and kills -----------------------------------------------------------------------------------------


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
