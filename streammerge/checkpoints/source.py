"""Byte ranges of one file: the one seam through which tensors are read."""

import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from streammerge.checkpoints import disk
from streammerge.checkpoints.header import header_length
from streammerge.errors import CheckpointError, TransferError

Part = tuple[int, memoryview]  # an offset, and the buffer to fill from there on

SAMPLE_GAP = 4096  # samples closer to one another than this are fetched in one request


class Source(ABC):
    """Anything that can fill buffers from byte offsets, from any thread.

    Attributes:
        where: how to name it in messages.
        size: of the whole file, in bytes.
        streamed: whether what is read travels over the network every time.
        missing: bytes that will have to be downloaded before the first read.
    """

    where: str
    size: int
    streamed: bool = False
    missing: int = 0

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` with the bytes from `offset` on; never less."""

    def read_many(self, parts: Sequence[Part]) -> None:
        """Fill several buffers; what is adjacent in the file may be read together."""
        for offset, buffer in parts:
            self.read_into(buffer, offset)

    def sample(self, parts: Sequence[Part]) -> None:
        """Fill several small buffers, without fetching the whole file for it."""
        self.read_many(parts)

    def sample_bytes(self, parts: Iterable[tuple[int, int]]) -> int:
        """How many bytes travel when (offset, count) parts are sampled."""
        return 0

    def header(self) -> bytes:
        """The JSON header of a safetensors file, without the 8 bytes of its length.

        Raises:
            HeaderError: there is none.
        """
        prefix = bytearray(min(8, self.size))
        self.read_into(memoryview(prefix), 0)
        raw = bytearray(header_length(bytes(prefix), self.size, self.where))
        self.read_into(memoryview(raw), 8)
        return bytes(raw)

    def will_need(self, offset: int, count: int) -> None:  # noqa: B027 - advice, to be ignored or not
        """These bytes will be read soon; nothing depends on it but time."""

    @property
    def stamp(self) -> tuple[int, int] | None:
        """Bytes, and nanoseconds of the last change, of a file of the user's as it was opened; None for others."""
        return None

    def require_unchanged(self) -> None:  # noqa: B027 - what a Hub has at a commit stays as it is
        """Raise CheckpointError where the file is not what it was when it was opened."""

    @abstractmethod
    def close(self) -> None: ...


def coalesce(ranges: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """Sorted (start, stop) ranges, those that overlap or are at most `gap` bytes apart made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


class LocalFile(Source):
    """A file on disk, read with `preadv` into the caller's buffer: no copy, no mapping, no shared position.

    Threads may read at once. Python's other threads run on while the kernel copies, which safetensors'
    own reader does not allow.

    Args:
        path: the file.
        where: how to name it in messages, usually "model X, file Y".

    Raises:
        CheckpointError: the file is missing or is not a regular file.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where, self._path = where, path
        try:
            self._fd = disk.open_to_read(path)
        except FileNotFoundError:
            raise CheckpointError(f"{where}: there is no such file") from None
        except OSError as error:
            raise TransferError(f"{where}: cannot be opened: {error.strerror}") from error
        try:
            self._status = disk.status(self._fd)
        except OSError as error:
            disk.close(self._fd)
            raise TransferError(f"{where}: cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(self._status.st_mode):
            disk.close(self._fd)
            raise CheckpointError(f"{where}: not a regular file")
        self.size = self._status.st_size
        disk.advise(self._fd, 0, 0, soon=False)

    @property
    def stamp(self) -> tuple[int, int]:
        return self.size, self._status.st_mtime_ns

    def require_unchanged(self) -> None:
        try:
            now = disk.status(self._path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.where}: was removed while it was being read") from None
        except OSError as error:
            raise TransferError(f"{self.where}: cannot be looked at: {error.strerror}") from error
        was = self._status
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (was.st_dev, was.st_ino, *self.stamp):
            raise CheckpointError(
                f"{self.where}: was written to or replaced while it was being read: run the command again once "
                "nothing writes there"
            )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        try:
            count = disk.read_into(self._fd, buffer, offset)
        except OSError as error:
            raise TransferError(f"{self.where}: reading at byte {offset}: {error.strerror}") from error
        if count < len(buffer):
            raise TransferError(f"{self.where}: ended at byte {offset + count} while being read: has it changed?")

    def will_need(self, offset: int, count: int) -> None:
        """Have the system read them into its cache meanwhile, which takes no memory of the process."""
        disk.advise(self._fd, offset, count, soon=True)

    def close(self) -> None:
        if self._fd >= 0:
            disk.close(self._fd)
            self._fd = -1
