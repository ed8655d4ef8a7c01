"""The journal: what is appended is there; what is torn is not believed."""

import os
from pathlib import Path
from typing import Any

import pytest

from streammerge.checkpoints.journal import Journal

ENTRIES: list[dict[str, Any]] = [
    {"identity": {"seed": 1, "path": "ab\udcff"}},  # a file name that is no UTF-8
    {"file": "é\n\r\u2028\x85\x0b", "n": [1.5, None, True]},
    {},
    {"file": "last", "sha256": "0" * 64},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    write(path, ENTRIES)
    return path


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    journal = Journal(path)
    for entry in entries:
        journal.append(entry)
    journal.close()


def entries(path: Path) -> list[dict[str, Any]]:
    journal = Journal(path)
    journal.close()
    return journal.entries


def test_what_was_appended_is_read_back(path: Path) -> None:
    assert entries(path) == ENTRIES


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    assert entries(tmp_path / "new") == []
    assert (tmp_path / "new").read_bytes() == b""


def test_entries_holds_the_old_ones_then_the_new_ones(path: Path) -> None:
    journal = Journal(path)
    journal.append({"more": 1})
    assert journal.entries == [*ENTRIES, {"more": 1}]
    journal.close()
    journal.close()
    assert entries(path) == [*ENTRIES, {"more": 1}]


@pytest.mark.parametrize("tail", [b"", b"\0" * 50, b"0badc0de {}", b" \n\n", bytes(range(256))])
def test_cut_at_every_length(path: Path, tail: bytes) -> None:
    """Whatever the disk made of what it had not written: what is behind the last whole line is overwritten."""
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length] + tail)
        intact = whole.count(b"\n", 0, length)
        assert entries(path) == ENTRIES[:intact], length
        write(path, ENTRIES[intact:])  # goes on where the intact lines end
        assert path.read_bytes() == whole, length


def test_any_flipped_bit_ends_the_journal_at_its_line(path: Path) -> None:
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            line = whole.count(b"\n", 0, position)
            assert entries(path) == ENTRIES[:line], (position, bit)


@pytest.mark.parametrize("tail", [b"\n", b"00000000\n", b"00000000 \n", b"\0" * 100 + b"\n", b"{}\n", b"0d4cbb29 []\n"])
def test_what_is_no_entry_is_not_believed(path: Path, tail: bytes) -> None:
    with path.open("ab") as file:
        file.write(tail)
    assert entries(path) == ENTRIES


def test_an_entry_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "journal"
    journal = Journal(path)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_bytes()))
    journal.append({"a": 1})
    assert synced == [path.read_bytes()]
    assert synced[0].endswith(b'{"a": 1}\n')
    journal.close()


def test_the_name_is_on_disk_before_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    write(tmp_path / "journal", ENTRIES[:1])
    assert synced == [str(tmp_path), str(tmp_path / "journal")]
    write(tmp_path / "journal", ENTRIES[:1])
    assert len(synced) == 3  # it has its name


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write(tmp_path / "journal", ENTRIES)
    assert entries(tmp_path / "journal") == ENTRIES
