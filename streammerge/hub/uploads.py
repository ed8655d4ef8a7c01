"""The shards of a merge, each uploaded by a thread of its own while the next is merged, and then removed."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread

from streammerge.checkpoints import disk
from streammerge.checkpoints.output import transfer_errors
from streammerge.checkpoints.room import DiskRoom
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.hub.files import PushedFile
from streammerge.hub.ledger import Ledger
from streammerge.hub.target import HubTarget
from streammerge.progress import progress_bar

SHARDS_ON_DISK = 2  # one that is merged and one that is uploaded


class Uploads:
    """Uploads each shard as the writer finishes it. Use as a context manager.

    Args:
        keep: leave the shards in the folder; else each goes once the Hub has it, and `room` makes the merge wait.

    Attributes:
        room: for the engine.
    """

    def __init__(
        self, target: HubTarget, ledger: Ledger, writer: CheckpointWriter, *, keep: bool, progress: bool
    ) -> None:
        self._target, self._ledger, self._writer, self._keep = target, ledger, writer, keep
        self.room = DiskRoom(writer, None if keep else SHARDS_ON_DISK)
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._lock = Lock()  # of the attributes below
        self._queued: set[str] = set()
        self._closed = False
        self._failure: BaseException | None = None
        self._idle = Event()
        self._bar = progress_bar(sum(shard.size for shard in writer.shards), "Upload", "B", progress)
        self._thread = Thread(target=self._run, name="streammerge-upload", daemon=True)

    def __enter__(self) -> Uploads:
        self._writer.on_finished = self._submit
        for file in [*self._writer.finished]:
            self._submit(file)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Return at once: an upload that is on its way may take minutes, and what it leads to counts no more."""
        with self._lock:
            self._closed = True
            self._ledger.close()
        self._queue.put(None)
        self._bar.close()

    def wait(self) -> None:
        """Wait until every finished shard is uploaded; raise what went wrong."""
        self._writer.wait()
        done = Event()
        self._idle = done
        self._queue.put("")  # answered when everything before it is done
        done.wait()
        if self._failure is not None:
            raise self._failure

    def files(self) -> dict[str, PushedFile]:
        """Every shard, for the commit."""
        found = {}
        for file, entry in self._writer.finished.items():
            content = None if self._ledger.uploaded.get(file) == entry["sha256"] else self._path(file)
            found[file] = PushedFile(content, entry["bytes"], entry["sha256"])
        return found

    def again(self, file: str) -> None:
        """The Hub has lost a shard: upload it once more, or have it merged once more where it is not here either."""
        self._ledger.lose(file)
        with self._lock:
            self._queued.discard(file)
        if self._path(file).exists():
            self._submit(file)
        else:
            self._writer.redo(file)

    def _path(self, file: str) -> Path:
        """Where a shard lies: a run that was interrupted while it published has moved it already."""
        work = self._writer.work / file
        return work if work.exists() else self._writer.folder / file

    def _submit(self, file: str) -> None:
        with self._lock:
            if file not in self._queued:
                self._queued.add(file)
                self._queue.put(file)

    def _run(self) -> None:
        while (file := self._queue.get()) is not None:
            if file == "":
                self._idle.set()
            elif self._failure is None:
                try:
                    self._upload(file)
                except BaseException as error:
                    self._failure = error
                    self.room.fail(error)

    def _upload(self, file: str) -> None:
        entry = self._writer.finished[file]
        path = self._path(file)
        known = self._ledger.uploaded.get(file) == entry["sha256"]
        there = known or self._target.upload(file, PushedFile(path, entry["bytes"], entry["sha256"]))
        with self._lock:
            if self._closed:
                return
            if there:
                if not known:
                    self._ledger.add(file, entry["bytes"], entry["sha256"])
                if not self._keep:
                    with transfer_errors(path, "cannot be removed after its upload"):
                        disk.remove(path)
            self._bar.update(entry["bytes"])
        self.room.release(file)
