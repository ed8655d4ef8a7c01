"""Room on disks, by made-up file systems and real sparse files."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from streammerge.checkpoints import disk_space
from streammerge.checkpoints.disk_space import Need, allocated, free_bytes, require_room, rooms
from streammerge.errors import TransferError


@pytest.fixture
def two_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`big` and `small` lie on disks with 1000 and 100 bytes free."""
    free = {"big": 1000, "small": 100}
    for name in free:
        (tmp_path / name).mkdir()
    plain = Path.stat

    def stat(self: Path, **options: bool) -> object:
        if self.parent == tmp_path and self.name in free:
            real = plain(self, **options)
            return SimpleNamespace(st_dev=hash(self.name), st_mode=real.st_mode)
        return plain(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: free[folder.name])
    return tmp_path


def test_needs_are_summed_by_file_system(two_disks: Path) -> None:
    big, small = two_disks / "big", two_disks / "small"
    needs = [Need("output", big / "not" / "yet", 700), Need("Fisher", small, 90), Need("journal", big, 300, there=50)]
    found = {room.folder: (room.missing, room.free, room.suffices) for room in rooms(needs)}
    assert found == {big: (950, 1000, True), small: (90, 100, True)}
    require_room(needs, "x")
    require_room([*needs, Need("more", big, 50)], "x")  # to the last byte
    with pytest.raises(TransferError) as error:
        require_room([*needs, Need("more", big, 51), Need("downloads", small, 11)], "choose another --out")
    assert str(error.value) == (
        f"not enough disk: 1 KB on {big} (output 700 B, journal 250 B, more 51 B), 1 KB are free; and 101 B on {small} "
        "(Fisher 90 B, downloads 11 B), 100 B are free: choose another --out, or --no-disk-check if you know better"
    )


def test_what_is_there_already_is_not_needed_twice(two_disks: Path) -> None:
    require_room([Need("output", two_disks / "small", 5000, there=4900)], "x")
    require_room([Need("removed", two_disks / "small", 0, there=400), Need("output", two_disks / "small", 100)], "x")
    with pytest.raises(TransferError):
        require_room([Need("output", two_disks / "small", 5000, there=4899)], "x")


def test_holes_are_not_there(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 24)
    assert allocated(tmp_path) < 1 << 20
    with (tmp_path / "full").open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    assert 1 << 20 <= allocated(tmp_path) < 2 << 20
    assert allocated(tmp_path / "none") == 0


def test_a_file_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path) == os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    require_room([Need("output", tmp_path, 1 << 60)], "x")
