"""One shard being written: positioned writes from any thread, hashed from the front as tensors complete."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from streammerge.checkpoints import disk
from streammerge.checkpoints.layout import Shard
from streammerge.checkpoints.output import transfer_errors
from streammerge.errors import TransferError
from streammerge.units import format_size

_HASH_PIECE = disk.PIECE


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
        new = not self.complete
        with transfer_errors(path, f"cannot reserve {format_size(shard.size)}"):
            self.fd = disk.open_to_write(path, make=new, empty=new)
            try:
                disk.reserve(self.fd, shard.size)
                self.write(0, memoryview(shard.header))
            except BaseException:
                self.close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        with transfer_errors(self.path, f"writing at byte {offset}"):
            disk.write_at(self.fd, data, offset)

    def flush(self) -> None:
        """Return once everything written so far is on disk, under the name of the file."""
        with transfer_errors(self.path, "cannot be made durable"):
            disk.sync_data(self.fd)
            if not self._name_is_durable:
                disk.sync_folder(self.path.parent)
                self._name_is_durable = True

    def close(self) -> None:
        disk.close(self.fd)

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
            piece = disk.read_at(self.fd, min(_HASH_PIECE, limit), self._position)
        if not piece:
            raise TransferError(f"{self.path}: ended at byte {self._position} while being hashed: has it changed?")
        return piece
