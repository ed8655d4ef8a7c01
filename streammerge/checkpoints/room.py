"""Keeping few shards on disk while a checkpoint is written whose shards leave as soon as they are finished."""

from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Condition, Event

from streammerge.checkpoints.writer import CheckpointWriter

_POLL_SECONDS = 0.1


class DiskRoom:
    """Lets a piece of work begin only while there is room on disk for the shards it writes to. For several threads.

    Shards are begun in their order: one ahead of its turn would take the room of one that must be finished first.
    Work that writes to more shards than there may be is let in when its turn comes and nothing is about to leave:
    waiting would not help it.

    Args:
        writer: writes the shards.
        limit: how many may lie in its hidden folder at once; None: any number.
    """

    def __init__(self, writer: CheckpointWriter, limit: int | None) -> None:
        self._writer, self._limit = writer, limit
        self._order = [shard.file for shard in writer.shards]
        self._file_of = {info.name: shard.file for shard in writer.shards for info in shard.tensors}
        self._tensors_of = {shard.file: [info.name for info in shard.tensors] for shard in writer.shards}
        self._unfinished: dict[str, Sequence[str]] = {}  # works still to be done, in their order
        self._working: Counter[str] = Counter()  # shard -> how many are at work on it
        self._released: set[str] = set()
        self._failure: BaseException | None = None
        self._changed = Condition()

    def expect(self, works: Mapping[str, Sequence[str]]) -> None:
        """Every piece of work to come, in order, with the tensors it writes."""
        with self._changed:
            self._unfinished = dict(works)

    def enter(self, work: str, stop: Event) -> bool:
        """Wait until the work may begin; False where `stop` was set meanwhile.

        Raises:
            BaseException: what `fail` was told.
        """
        with self._changed:
            files = {self._file_of[name] for name in self._unfinished[work]}
            while not self._fits(work, files):
                if stop.is_set():
                    return False
                self._changed.wait(_POLL_SECONDS)
            self._working.update(files)
            self._released -= files
        return True

    def leave(self, work: str) -> None:
        """The work that `enter` let in is done."""
        with self._changed:
            self._working -= Counter({self._file_of[name] for name in self._unfinished.pop(work)})
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

    def _fits(self, work: str, files: set[str]) -> bool:
        if self._failure is not None:
            raise self._failure
        if self._limit is None:
            return True
        self._writer.check()
        there = (self._writer.on_disk() | set(self._working)) - self._released
        new = [file for file in self._order if file in files - there]
        if not new:
            return True
        if len(there | files) <= self._limit:
            earlier = {*self._order[: self._order.index(new[-1])]} - there - files
            if all(self._is_complete(file) for file in earlier):
                return True
        return work == next(iter(self._unfinished)) and not any(self._is_complete(file) for file in there)

    def _is_complete(self, file: str) -> bool:
        """Whether the shard is on its way out, or gone."""
        return all(self._writer.is_complete(name) for name in self._tensors_of[file])
