"""Writing a checkpoint: header first, tensors at their offsets, index last.

The work happens in a hidden folder inside the output folder. Each finished shard is fsynced and recorded in
a journal with its SHA-256; the index (or the single `model.safetensors`) moves into place last, so that a
half-written folder never loads as a checkpoint. The same call again goes on behind the last finished shard.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Self

from streammerge.checkpoints.checkpoint import INDEX_FILE, MANIFEST_FILE, SINGLE_FILE
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.journal import Journal
from streammerge.checkpoints.layout import Shard
from streammerge.checkpoints.output import WORK_DIR, files_of_manifest, transfer_errors
from streammerge.errors import OutputExistsError, TransferError
from streammerge.units import format_size

_HASH_PIECE = 1 << 20


class _ShardFile:
    """One open shard: positioned writes from any thread, hashed from the front as tensors complete."""

    def __init__(self, shard: Shard, path: Path) -> None:
        self.shard = shard
        self.path = path
        self.complete: set[str] = set()
        self.digest = hashlib.sha256(shard.header)
        self.hashed = 0  # tensors hashed so far, in file order
        with transfer_errors(path, f"cannot reserve {format_size(shard.size)}"):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
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

    def hash_ahead(self) -> bool:
        """Hash every tensor that is complete and next in line; True when the whole shard is hashed."""
        while self.hashed < len(self.shard.tensors) and self.shard.tensors[self.hashed].name in self.complete:
            info = self.shard.tensors[self.hashed]
            position = info.start
            while position < info.stop:
                with transfer_errors(self.path, f"reading back at byte {position}"):
                    piece = os.pread(self.fd, min(_HASH_PIECE, info.stop - position), position)
                if not piece:
                    raise TransferError(f"{self.path}: ended at byte {position} while being hashed: has it changed?")
                self.digest.update(piece)
                position += len(piece)
            self.hashed += 1
        return self.hashed == len(self.shard.tensors)


class CheckpointWriter:
    """Writes a planned checkpoint into `folder`. Use as a context manager around writing and `publish`.

    Args:
        folder: the output folder, already accepted by `check_output`.
        shards: the layout.
        identity: what the bytes depend on; a run left unfinished under another identity is refused.
        fresh: start anew instead of going on behind the last finished shard.
        manifest: the file among those published that lists them all.

    Attributes:
        finished: file -> {"bytes", "sha256", "tensors": {name: entry}} of every shard that is done.

    Raises:
        OutputExistsError: the folder holds an unfinished run of another identity.
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
    ) -> None:
        self.folder, self.work, self.shards = folder, folder / WORK_DIR, shards
        self._manifest = manifest
        self.finished: dict[str, dict[str, Any]] = {}
        self._shard_of = {info.name: shard for shard in shards for info in shard.tensors}
        self._info_of = {info.name: info for shard in shards for info in shard.tensors}
        self._files: dict[str, _ShardFile] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        with transfer_errors(self.work, "cannot be prepared"):
            if fresh and self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.work / "journal")
        self._hasher = ThreadPoolExecutor(1, "streammerge-hash")
        self._hashing: list[Future[None]] = []
        try:
            layout = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
            with transfer_errors(self.work, "resuming"):
                self._resume(json.loads(json.dumps({**identity, "layout": layout})))
        except BaseException:
            self._close()
            raise

    def info(self, name: str) -> TensorInfo:
        """Where the tensor goes."""
        return self._info_of[name]

    def is_finished(self, name: str) -> bool:
        """Whether the tensor's shard was finished by this or an earlier run."""
        return self._shard_of[name].file in self.finished

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor, from byte `start` of the tensor on. Any order, any thread."""
        info = self._info_of[name]
        if start < 0 or start + len(data) > info.nbytes:
            raise ValueError(f"bytes {start}..{start + len(data)} of {name!r}, which has {info.nbytes}")
        self._open(self._shard_of[name]).write(info.start + start, data)

    def complete(self, name: str, entry: Mapping[str, Any]) -> None:
        """All bytes of the tensor are written; `entry` is what the journal and the report keep of it."""
        shard = self._shard_of[name]
        file = self._open(shard)
        with self._lock:
            self._entries[name] = dict(entry)
            file.complete.add(name)
            for future in [future for future in self._hashing if future.done()]:
                self._hashing.remove(future)
                future.result()  # raises what went wrong while hashing, rather now than at the end
            self._hashing.append(self._hasher.submit(self._advance, file))

    def publish(self, files: Mapping[str, bytes | Path]) -> None:
        """Move everything into place: other files first, then the shards, the manifest, the index.

        Args:
            files: name -> content, or the file to copy.
        """
        self.wait()
        missing = [shard.file for shard in self.shards if shard.file not in self.finished]
        if missing:
            raise RuntimeError(f"{missing[0]} is not complete")  # a bug of ours, never the user's doing
        staged = {name: self._stage(name, content) for name, content in files.items()}
        if len(self.shards) > 1:
            staged[INDEX_FILE] = self._stage(INDEX_FILE, self._index())
        shards = {s.file: self.work / s.file for s in self.shards if (self.work / s.file).exists()}
        last = (self._manifest, INDEX_FILE, SINGLE_FILE)
        everything = {**staged, **shards}
        with transfer_errors(self.folder, "moving the finished files into place"):
            self._remove_previous()
            for name in sorted(everything, key=lambda name: last.index(name) if name in last else -1):
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(everything[name], target)
            _fsync_folder(self.folder)
            self._close()
            shutil.rmtree(self.work)

    def wait(self) -> None:
        """Wait for the hashing thread; raise what went wrong there."""
        with self._lock:
            pending, self._hashing = self._hashing, []
        for future in pending:
            future.result()

    def discard(self) -> None:
        """Remove what this run wrote, and the folders this run made."""
        self._close()
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # not empty: somebody else's
            for path in self._created:
                path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _resume(self, identity: dict[str, Any]) -> None:
        entries = self._journal.entries
        if not entries:
            self._journal.append({"identity": identity})
            return
        known = entries[0].get("identity", {})
        if known != identity:
            keys = sorted(key for key in {*known, *identity} if known.get(key, ()) != identity.get(key, ()))
            raise OutputExistsError(
                f"output folder {self.folder} holds an unfinished run that differs in {', '.join(keys)}: "
                "repeat that command to finish it, choose another --out, or start anew with --overwrite"
            )
        by_file = {shard.file: shard for shard in self.shards}
        for entry in entries[1:]:
            path = next((p for p in (self.work / entry["file"], self.folder / entry["file"]) if p.exists()), None)
            intact = path is not None and path.stat().st_size == by_file[entry["file"]].size
            if path is not None and intact and _sha256(path) == entry["sha256"]:
                self._finish(entry)

    def _finish(self, entry: Mapping[str, Any]) -> None:
        self.finished[entry["file"]] = {key: entry[key] for key in ("bytes", "sha256", "tensors")}

    def _open(self, shard: Shard) -> _ShardFile:
        with self._lock:
            if shard.file in self.finished:
                raise RuntimeError(f"{shard.file} is already finished")  # opening it again would empty it
            if shard.file not in self._files:
                self._files[shard.file] = _ShardFile(shard, self.work / shard.file)
            return self._files[shard.file]

    def _advance(self, file: _ShardFile) -> None:
        if file.shard.file in self.finished or not file.hash_ahead():
            return
        shard = file.shard
        tensors = {info.name: self._entries.pop(info.name) for info in shard.tensors}
        entry = {"file": shard.file, "bytes": shard.size, "sha256": file.digest.hexdigest(), "tensors": tensors}
        with transfer_errors(file.path, "cannot be made durable"):
            os.fsync(file.fd)
            self._journal.append(entry)
        self._finish(entry)
        with self._lock:
            os.close(self._files.pop(shard.file).fd)

    def _stage(self, name: str, content: bytes | Path) -> Path:
        path = self.work / "files" / name
        with transfer_errors(
            path, f"cannot be copied from {content}" if isinstance(content, Path) else "cannot be written"
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as target:
                if isinstance(content, bytes):
                    target.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
        return path

    def _index(self) -> bytes:
        total = sum(info.nbytes for info in self._info_of.values())
        weight_map = {name: self._shard_of[name].file for name in sorted(self._shard_of)}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"

    def _remove_previous(self) -> None:
        """Remove a finished checkpoint of ours, what makes it loadable first (`check_output` allowed it)."""
        previous = files_of_manifest(self.folder, self._manifest) or []
        recovered = {shard.file for shard in self.shards if not (self.work / shard.file).exists()}
        for name in sorted(previous, key=lambda name: (name not in (INDEX_FILE, SINGLE_FILE), name == self._manifest)):
            if name not in recovered:
                (self.folder / name).unlink(missing_ok=True)

    def _close(self) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()
            self._journal.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
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
