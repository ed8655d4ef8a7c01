"""Whether the disks have room for what will be written: known before the first byte is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import TransferError
from streammerge.units import format_size


@dataclass(frozen=True)
class Need:
    """Bytes that one thing takes.

    Attributes:
        what: its name.
        folder: where; it need not be there yet.
        size: how many, those that an unfinished run wrote included.
        there: how many of them that run wrote.
    """

    what: str
    folder: Path
    size: int
    there: int = 0

    @property
    def missing(self) -> int:
        return max(0, self.size - self.there)


@dataclass(frozen=True)
class Room:
    """One file system and what is needed there.

    Attributes:
        folder: a folder on it.
        needs: what goes there.
        free: bytes; None where the file system does not say.
    """

    folder: Path
    needs: Sequence[Need]
    free: int | None

    @property
    def missing(self) -> int:
        return sum(need.missing for need in self.needs)

    @property
    def suffices(self) -> bool:
        return self.free is None or self.missing <= self.free

    def text(self) -> str:
        parts = ", ".join(f"{need.what} {format_size(need.missing)}" for need in self.needs if need.missing)
        free = "what is free is not known" if self.free is None else f"{format_size(self.free)} are free"
        return f"{format_size(self.missing)} on {self.folder} ({parts or 'nothing'}), {free}"


def rooms(needs: Iterable[Need]) -> list[Room]:
    """The needs by file system, in their order."""
    groups: dict[int, tuple[Path, list[Need]]] = {}
    for need in needs:
        folder = _existing(need.folder)
        groups.setdefault(folder.stat().st_dev, (folder, []))[1].append(need)
    return [Room(folder, of_device, free_bytes(folder)) for folder, of_device in groups.values()]


def require_room(needs: Iterable[Need], advice: str) -> None:
    """Refuse work for which a disk has no room.

    Raises:
        TransferError: with the sums, by file system.
    """
    short = [room for room in rooms(needs) if not room.suffices]
    if short:
        told = "; and ".join(room.text() for room in short)
        raise TransferError(f"not enough disk: {told}: {advice}, or --no-disk-check if you know better")


def free_bytes(folder: Path) -> int | None:
    """What this user may write on the folder's file system; None where it does not say.

    A quota may leave less: then the shard that does not fit is refused when its room is reserved.
    """
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def allocated(folder: Path) -> int:
    """Bytes on disk of all files below a folder: holes of sparse files take none."""
    return sum(blocks_of(path) for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def blocks_of(path: Path) -> int:
    """Bytes that a file takes on disk, at most its length."""
    status = path.stat()
    return min(getattr(status, "st_blocks", 0) * 512, status.st_size)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
