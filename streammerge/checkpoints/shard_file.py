"""One shard being written: positioned writes from any thread, hashed from the front as tensors complete."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from streammerge.checkpoints.layout import Shard
from streammerge.checkpoints.output import transfer_errors
from streammerge.errors import TransferError
from streammerge.units import format_size

_HASH_PIECE = 1 << 20


class ShardFile:
    """An open shard.

    Args:
        shard: where in the file everything goes.
        path: the file; made anew, unless some tensors in it are complete.
        complete: the names of those tensors.
    """

    def __init__(self, shard: Shard, path: Path, complete: Iterable[str] = ()) -> None:
        self.shard, self.path = shard, path
        self.complete = set(complete)
        self.digest = hashlib.sha256(shard.header)
        self._hashed = 0  # tensors hashed so far, in file order
        self._position = len(shard.header)  # bytes hashed so far
        self._name_is_durable = False
        new = 0 if self.complete else os.O_CREAT | os.O_TRUNC
        with transfer_errors(path, f"cannot reserve {format_size(shard.size)}"):
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | new, 0o666)
            try:
                _reserve(self.fd, shard.size)
                self.write(0, memoryview(shard.header))
            except BaseException:
                os.close(self.fd)
                raise

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            with transfer_errors(self.path, f"writing at byte {offset}"):
                count = os.pwrite(self.fd, data, offset)
            data, offset = data[count:], offset + count

    def flush(self) -> None:
        """Return once everything written so far is on disk, under the name of the file."""
        with transfer_errors(self.path, "cannot be made durable"):
            getattr(os, "fdatasync", os.fsync)(self.fd)  # macOS has only the latter
            if not self._name_is_durable:
                fsync_folder(self.path.parent)
                self._name_is_durable = True

    def hash_ahead(self, between: Callable[[], None]) -> bool:
        """Hash every tensor that is complete and next in line; True when the whole shard is hashed.

        Args:
            between: called after every piece, because a whole shard may take long.
        """
        tensors = self.shard.tensors
        while self._hashed < len(tensors) and tensors[self._hashed].name in self.complete:
            while self._position < tensors[self._hashed].stop:
                piece = self._read(tensors[self._hashed].stop - self._position)
                self.digest.update(piece)
                self._position += len(piece)
                between()
            self._hashed += 1
        return self._hashed == len(tensors)

    def _read(self, limit: int) -> bytes:
        with transfer_errors(self.path, f"reading back at byte {self._position}"):
            piece = os.pread(self.fd, min(_HASH_PIECE, limit), self._position)
        if not piece:
            raise TransferError(f"{self.path}: ended at byte {self._position} while being hashed: has it changed?")
        return piece


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    """Have the disk set `size` bytes aside, so that a full one shows now; only set the length where it cannot."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # not on macOS
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)
