"""Writing a checkpoint: header first, tensors at their offsets, index last.

The work happens in a hidden folder inside the output folder. A journal there records each finished shard with
its SHA-256, and every few seconds the tensors completed since, always after their bytes are on disk. The index (or
the single `model.safetensors`) moves into place last, so that a half-written folder never loads as a checkpoint.
The same call again goes on with the tensors that are not complete.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from threading import Lock
from typing import Any, Self

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.checkpoints.checksum import add, part_sum
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.identity import differences
from streammerge.checkpoints.journal_text import check_journal, identity_of, require_nothing_done
from streammerge.checkpoints.layout import Shard, index_files
from streammerge.checkpoints.output import WORK_DIR, transfer_errors
from streammerge.checkpoints.placing import move_into_place
from streammerge.checkpoints.resume import find_leftover
from streammerge.checkpoints.shard_file import ShardFile
from streammerge.checkpoints.work import WorkFolder
from streammerge.errors import OutputExistsError, TransferError

SYNC_SECONDS = 2.0  # from one sync to the next: about as much work is lost when the power fails


def nothing_elsewhere(work: Path) -> Mapping[str, str]:
    """Every finished shard is in its folder."""
    del work
    return {}


class CheckpointWriter:
    """Writes a planned checkpoint into `folder`. Use as a context manager around writing and `publish`.

    Args:
        folder: the output folder, already accepted by `check_output`.
        shards: the layout.
        identity: what the bytes depend on; a run left unfinished under another identity is refused.
        fresh: start anew instead of going on where an earlier run was.
        manifest: the file among those published that lists them all.
        elsewhere: given the hidden folder, file -> SHA-256 of the finished shards that are kept safe somewhere else:
            those are done even when their file is gone.
        label: what messages call the run, where the folder is not of the user's choice.

    Attributes:
        entries: tensor name -> entry of every complete tensor, of this run and earlier ones.
        finished: file -> {"bytes", "sha256", "tensors": {name: entry}} of every shard that is done.
        work: the hidden folder; removed by `publish` and `discard`.
        on_finished: called with the file of a shard that is finished from now on, in the hashing thread.

    Raises:
        OutputExistsError: another process writes there, or the folder holds an unfinished run of another identity.
        TransferError: the disk is full or fails. What is done stays, for the next run.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        *,
        fresh: bool = False,
        manifest: str = MANIFEST_FILE,
        elsewhere: Callable[[Path], Mapping[str, str]] = nothing_elsewhere,
        label: str | None = None,
    ) -> None:
        self.folder, self.shards = folder, shards
        self._manifest, self._label = manifest, label
        self.on_finished: Callable[[str], None] = lambda file: None
        self.entries: dict[str, dict[str, Any]] = {}
        self.finished: dict[str, dict[str, Any]] = {}
        self._shard_of = {info.name: shard for shard in shards for info in shard.tensors}
        self._info_of = {info.name: info for shard in shards for info in shard.tensors}
        self._files: dict[str, ShardFile] = {}
        self._sums: dict[str, int] = {}  # of the bytes of every tensor that this run completed, see `checksum.py`
        self._unrecorded: set[str] = set()  # complete, but in no line of the journal
        self._recorded_at = time.monotonic()
        self._failure: BaseException | None = None
        self._lock = Lock()  # of the attributes above
        self._recording = Lock()  # of the journal, and of closing a file; taken before the other
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        with transfer_errors(folder / WORK_DIR, "cannot be prepared"):
            self._work = WorkFolder(folder, fresh=fresh, label=label)
        self.work, self._journal = self._work.path, self._work.journal
        self._hasher = ThreadPoolExecutor(1, "streammerge-hash")
        self._syncer = ThreadPoolExecutor(1, "streammerge-sync")  # hashing goes on while the disk is waited for
        self._syncing: Future[None] | None = None
        self._pending: list[Future[None]] = []  # of both
        try:
            layout = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
            with transfer_errors(self.work, "resuming"):
                self._resume(json.loads(json.dumps({**identity, "layout": layout})), elsewhere(self.work))
        except BaseException:
            self._close()
            raise

    def info(self, name: str) -> TensorInfo:
        """Where the tensor goes."""
        return self._info_of[name]

    def is_complete(self, name: str) -> bool:
        """Whether the tensor was completed by this or an earlier run."""
        return name in self.entries

    def open(self, names: Iterable[str]) -> None:
        """Open the files of tensors that are not complete, and reserve their room: a full disk shows now.

        After that forks of this process may `write` to them, and nothing else.
        """
        with self._lock:
            for name in names:
                self._open(name)

    def write(self, name: str, start: int, data: memoryview) -> int:
        """Write bytes of a tensor, from byte `start` of the tensor on. Any order, any thread.

        Returns:
            What they add to the tensor's checksum, for `complete`.
        """
        info = self._info_of[name]
        if start < 0 or start + len(data) > info.nbytes:
            raise ValueError(f"bytes {start}..{start + len(data)} of {name!r}, which has {info.nbytes}")
        file = self._files.get(self._shard_of[name].file)  # a fork must not take the lock: who holds it may be no more
        if file is None or name in self.entries:
            with self._lock:
                file = self._open(name)
        file.write(info.start + start, data)
        return part_sum(data, start)

    def complete(self, name: str, entry: Mapping[str, Any], written: Iterable[int]) -> None:
        """All bytes of the tensor are written.

        Args:
            entry: what the journal and the report keep of it, as JSON.
            written: what every `write` to it returned.
        """
        plain = json.loads(json.dumps(entry))  # what the journal gives back: tuples are lists
        with self._lock:
            file = self._open(name)
            self.entries[name] = plain
            self._sums[name] = reduce(add, written, 0)
            self._unrecorded.add(name)
            file.complete.add(name)
            self._raise_failures()
            self._pending.append(self._hasher.submit(self._advance, file))

    def check(self) -> None:
        """Raise what went wrong so far in the threads that hash and sync."""
        with self._lock:
            self._raise_failures()

    def sync(self) -> None:
        """Make every complete tensor durable: no kill and no power failure costs it any more. Any thread."""
        with self._record():
            with self._lock:
                names = sorted(self._unrecorded)
                files = [file for file in self._files.values() if self._unrecorded & file.complete]
            if names:
                for file in files:
                    file.flush()  # before the journal says so
                sums = {name: self._sums[name] for name in names}
                self._journal.append({"tensors": {name: self.entries[name] for name in names}, "sums": sums})
                self._forget(names)
            self._recorded_at = time.monotonic()

    def publish(self, files: Mapping[str, bytes | Path], beside: Mapping[str, bytes | Path] | None = None) -> None:
        """Move everything into place: other files and shards first, then the manifest, at last the index.

        Args:
            files: name -> content, or the file to copy.
            beside: likewise, what is no part of the checkpoint; it comes after all the rest.
        """
        self.wait()
        missing = [shard.file for shard in self.shards if shard.file not in self.finished]
        if missing:
            raise RuntimeError(f"{missing[0]} is not complete")  # a bug of ours, never the user's doing
        with transfer_errors(self.folder, "moving the finished files into place"):
            everything_else = {**files, **index_files(self.shards)}
            move_into_place(self.folder, self.shards, everything_else, beside or {}, self._manifest)
            self._close_files()
            self._work.remove()
            self._close()

    def on_disk(self) -> set[str]:
        """The files of the shards that lie in the hidden folder, finished or not."""
        return {shard.file for shard in self.shards if (self.work / shard.file).exists()}

    def redo(self, file: str) -> None:
        """A finished shard is lost: its tensors are to be written again."""
        with self._record():
            self._journal.append({"redo": file})
            with self._lock:
                for name in self.finished.pop(file)["tensors"]:
                    del self.entries[name]

    def wait(self) -> None:
        """Wait for the threads that hash and sync; raise what went wrong there."""
        while pending := self._taken():
            for future in pending:
                future.result()

    def discard(self) -> None:
        """Remove what this run wrote, and the folders this run made."""
        self._close_files()
        with suppress(OSError):
            self._work.remove()
        self._close()
        with suppress(OSError):  # not empty: somebody else's
            for path in self._created:
                disk.remove_folder(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            with suppress(TransferError):  # it would hide `exc`
                self.sync()
        finally:
            self._close()

    def _resume(self, identity: dict[str, Any], elsewhere: Mapping[str, str]) -> None:
        lines = self._journal.entries
        if not lines:
            require_nothing_done(self.work, self.folder)
            self._journal.append({"identity": identity})
            return
        self._check_identity(identity_of(lines, self.folder), identity)
        check_journal(lines[1:], self.shards, self.folder)
        left = find_leftover(lines[1:], self.shards, self.work, self.folder, elsewhere)
        for name in left.redo:
            self._journal.append({"redo": name})  # before the new file looks like the old one
        for line in left.finished.values():
            self.entries |= line["tensors"]
            self._finish(line)
        for shard in self.shards:
            if complete := left.complete.get(shard.file):
                self.entries |= complete
                file = self._files[shard.file] = ShardFile(shard, self.work / shard.file, complete)
                self._pending.append(self._hasher.submit(self._advance, file))  # it may lack nothing but its hash

    def _check_identity(self, known: dict[str, Any], identity: dict[str, Any]) -> None:
        if differing := differences(known, identity):
            told = f"output folder {self.folder} holds an unfinished run that", ", choose another --out,"
            what, other = (f"an unfinished {self._label}", "") if self._label else told
            raise OutputExistsError(
                f"{what} differs in {', '.join(differing)}: repeat that command to finish it{other} or start anew with "
                "--overwrite"
            )

    def _taken(self) -> list[Future[None]]:
        """What is pending; a hash may ask for a sync meanwhile."""
        with self._lock:
            pending, self._pending = self._pending, []
        return pending

    def _raise_failures(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()  # raises what went wrong, rather now than at the end

    def _finish(self, line: Mapping[str, Any]) -> None:
        self.finished[line["file"]] = {key: line[key] for key in ("bytes", "sha256", "tensors")}

    def _open(self, name: str) -> ShardFile:
        """The file of a tensor that is not complete."""
        if name in self.entries:
            raise RuntimeError(f"tensor {name!r} is already complete")  # its bytes may be hashed already
        shard = self._shard_of[name]
        if shard.file not in self._files:
            self._files[shard.file] = ShardFile(shard, self.work / shard.file)
        return self._files[shard.file]

    def _advance(self, file: ShardFile) -> None:
        """Hash what is next in line, record what is due. In the hashing thread."""
        if file.shard.file not in self.finished and file.hash_ahead(self._sync_if_due):
            self._record_shard(file)
        self._sync_if_due()

    def _sync_if_due(self) -> None:
        passed = time.monotonic() - self._recorded_at
        idle = self._syncing is None or self._syncing.done()
        if idle and self._unrecorded and not 0 <= passed <= SYNC_SECONDS:  # below 0: a clock that was set back
            with self._lock:
                self._syncing = self._syncer.submit(self.sync)
                self._pending.append(self._syncing)

    def _record_shard(self, file: ShardFile) -> None:
        shard = file.shard
        tensors = {info.name: self.entries[info.name] for info in shard.tensors}
        line = {"file": shard.file, "bytes": shard.size, "sha256": file.digest.hexdigest(), "tensors": tensors}
        with self._record():
            file.flush()
            self._journal.append(line)
            self._finish(line)
            self._forget(tensors)
            with self._lock:
                self._files.pop(shard.file).close()
        self.on_finished(shard.file)

    @contextmanager
    def _record(self) -> Iterator[None]:
        """One record at a time, and none after a failure: a disk says only once that it lost data."""
        with self._recording:
            if self._failure is not None:
                raise TransferError(f"{self.work}: nothing is recorded any more after this: {self._failure}")
            try:
                with transfer_errors(self.work, "cannot be made durable"):
                    yield
            except BaseException as error:
                self._failure = error
                raise

    def _forget(self, recorded: Iterable[str]) -> None:
        with self._lock:
            self._unrecorded.difference_update(recorded)

    def _close_files(self) -> None:
        for threads in (self._hasher, self._syncer):  # the first may give work to the second
            threads.shutdown(wait=True, cancel_futures=True)
        with self._recording, self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._unrecorded.clear()

    def _close(self) -> None:
        self._close_files()
        self._work.close()
