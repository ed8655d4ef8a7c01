"""Keeping few shards on disk while a checkpoint is written whose shards leave as soon as they are finished."""

from collections import Counter
from collections.abc import Iterable
from threading import Condition, Event

from streammerge.checkpoints.writer import CheckpointWriter

_POLL_SECONDS = 0.1


class DiskRoom:
    """Lets the work on a shard begin only while there is room for its file. For several threads.

    Work whose tensors lie in more shards than there may be is let in once nothing else goes on: waiting would not
    help it.

    Args:
        writer: writes the shards.
        limit: how many may lie in its hidden folder at once; None: any number.
    """

    def __init__(self, writer: CheckpointWriter, limit: int | None) -> None:
        self._writer, self._limit = writer, limit
        self._file_of = {info.name: shard.file for shard in writer.shards for info in shard.tensors}
        self._tensors_of = {shard.file: [info.name for info in shard.tensors] for shard in writer.shards}
        self._working: Counter[str] = Counter()  # shard -> how many are at work on it
        self._released: set[str] = set()
        self._failure: BaseException | None = None
        self._changed = Condition()

    def enter(self, names: Iterable[str], stop: Event) -> frozenset[str] | None:
        """Wait until these tensors may be written.

        Returns:
            What to hand to `leave` after the work; None where `stop` was set meanwhile.

        Raises:
            BaseException: what `fail` was told.
        """
        files = frozenset(self._file_of[name] for name in names if not self._writer.is_complete(name))
        with self._changed:
            while not self._fits(files):
                if stop.is_set():
                    return None
                self._changed.wait(_POLL_SECONDS)
            self._working.update(files)
            self._released -= files
        return files

    def leave(self, files: frozenset[str]) -> None:
        """The work that `enter` let in is done."""
        with self._changed:
            self._working -= Counter(files)
            self._changed.notify_all()

    def release(self, file: str) -> None:
        """A finished shard takes no room any more: its file is gone, or has to stay."""
        with self._changed:
            self._released.add(file)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No file will go any more: whoever waits or comes raises `error`."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _fits(self, files: frozenset[str]) -> bool:
        if self._failure is not None:
            raise self._failure
        if self._limit is None:
            return True
        self._writer.check()
        there = (self._writer.on_disk() | set(self._working)) - self._released
        if len(there | files) <= self._limit:
            return True
        return not self._working and not any(self._is_leaving(file) for file in there)

    def _is_leaving(self, file: str) -> bool:
        return all(self._writer.is_complete(name) for name in self._tensors_of[file])
