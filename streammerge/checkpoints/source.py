"""Byte ranges of one file: the one seam through which tensors are read."""

import os
import stat
from pathlib import Path
from typing import Protocol

from streammerge.errors import CheckpointError, TransferError


class Source(Protocol):
    """Anything that can fill a buffer from a byte offset."""

    where: str
    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` with the bytes from `offset` on; never less."""

    def will_need(self, offset: int, count: int) -> None:
        """These bytes will be read soon; nothing depends on it but time."""

    def close(self) -> None: ...


class LocalFile:
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
        self.where = where
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CheckpointError(f"{where}: there is no such file") from None
        except OSError as error:
            raise TransferError(f"{where}: cannot be opened: {error.strerror}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise CheckpointError(f"{where}: not a regular file")
        self.size = status.st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise TransferError(f"{self.where}: reading at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise TransferError(f"{self.where}: ended at byte {offset + done} while being read: has it changed?")
            done += count

    def will_need(self, offset: int, count: int) -> None:
        """Have the system read them into its cache meanwhile, which takes no memory of the process."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
