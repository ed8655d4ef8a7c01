"""A disk that is full or fails is one TransferError, and what was done stays."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints.folders import content
from checkpoints.writing import FILES, IDENTITY, STATE, bits, fill, kill_at, loads, planned, raw, resumed

from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import TransferError


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("posix_fallocate", f"{FILES[0]}: cannot reserve"),
        ("pwrite", f"{FILES[0]}: writing at byte 0"),
        ("pread", f"{FILES[0]}: reading back at byte"),
        ("fsync", f"{FILES[0]}: cannot be made durable"),
        ("fdatasync", f"{FILES[0]}: cannot be made durable"),
    ],
)
def test_a_failing_disk_is_a_transfer_error(
    out: Path,
    expected: dict[str, bytes],
    open_fds: set[int],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    call: str,
    words: str,
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        patch.setattr(os, call, fail)
        with pytest.raises(TransferError) as caught:
            fill(writer, STATE)
    assert words in str(caught.value)
    assert str(caught.value).endswith(os.strerror(code))
    assert not open_fds
    assert resumed(out) == set() or call == "pread"  # what could not be read back was written
    assert content(out) == expected


def test_a_full_disk_names_the_space_it_needs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, os, "posix_fallocate", 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    size = planned(STATE)[0].size
    with (
        CheckpointWriter(out, planned(STATE), IDENTITY) as writer,
        pytest.raises(TransferError, match=f"cannot reserve {size} B: {os.strerror(errno.ENOSPC)}"),
    ):
        fill(writer, STATE)


def test_the_journal_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        kill_at(monkeypatch, os, "write", 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(TransferError, match="cannot be made durable"):
            fill(writer, STATE)


def test_a_shard_cut_behind_our_back_while_it_is_hashed(out: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        writer.write("c", 0, memoryview(raw(STATE["c"])))
        os.truncate(out / WORK_DIR / FILES[1], 500)
        writer.complete("c", {}, [])
        with pytest.raises(TransferError, match=f"{FILES[1]}: ended at byte 500"):
            writer.wait()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransferError, match=r"cannot be prepared: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "out", planned(STATE), IDENTITY)


def test_a_side_file_that_vanished(out: Path, tmp_path: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE)
        with pytest.raises(TransferError, match=r"tokenizer\.json: cannot be copied from .*gone"):
            writer.publish({"tokenizer.json": tmp_path / "gone"})
    assert loads(out) is None


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_disk_that_cannot_reserve_is_written_all_the_same(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE)
        writer.publish({"config.json": b"{}"})
    assert loads(out) == bits(STATE)
