"""What of a push is done: a journal of its own beside the writer's, in the same hidden folder.

Its lines, in the order of their time:

- `{"target": ..., "head": commit}`: where the model goes, and the commit the branch was at when the push began.
- `{"file", "bytes", "sha256"}`: the Hub has this shard; its file here may be gone.
- `{"lost": file}`: the Hub has it no more.
- `{"committing": true}`: from here on the commit may have been made, whatever was heard of it.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

from streammerge.checkpoints.journal import Journal
from streammerge.checkpoints.output import transfer_errors
from streammerge.errors import TransferError
from streammerge.hub.settings import PushSettings

LEDGER_FILE = "uploads"


class Ledger:
    """The ledger in a locked work folder; for several threads.

    What earlier pushes uploaded counts if they went to the same repository: what one has is there for all branches.

    Args:
        work: the hidden folder.
        settings: the push of this run.
        endpoint: which Hub.

    Attributes:
        uploaded: file -> SHA-256 of every shard that the Hub has.
        begun: whether an earlier run began this very push.
        head: the commit the branch was at then; None for a branch without any.
        committing: whether an earlier run may have made the commit.
    """

    def __init__(self, work: Path, settings: PushSettings, endpoint: str) -> None:
        self._path, self._lock = work / LEDGER_FILE, Lock()
        self._repository = {"endpoint": endpoint, "repository": settings.repository}
        self._target = {"branch": settings.branch, "create_pr": settings.create_pr}
        self.uploaded: dict[str, str] = {}
        self.head: str | None = None
        self.begun = self.committing = self._ours = False
        with transfer_errors(self._path, "cannot be read"):
            self._journal = Journal(self._path)
        for line in self._journal.entries:
            self._replay(line)

    def begin(self, head: str | None) -> None:
        """A push to this target starts with the branch at `head`."""
        self._append({**self._repository, "target": self._target, "head": head})

    def add(self, file: str, size: int, sha256: str) -> None:
        self._append({"file": file, "bytes": size, "sha256": sha256})

    def lose(self, file: str) -> None:
        self._append({"lost": file})

    def commit(self) -> None:
        """Called before the commit is asked for."""
        if not self.committing:
            self._append({"committing": True})

    def close(self) -> None:
        """Write nothing any more, whoever still asks for it."""
        with self._lock:
            self._journal.close()

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, transfer_errors(self._path, "cannot be written"):
            self._journal.append(line)
            self._replay(line)

    def _replay(self, line: dict[str, Any]) -> None:
        text = [line[key] for key in ("file", "sha256", "lost", "head") if line.get(key) is not None]
        if not all(isinstance(value, str) for value in text) or ("file" in line) != ("sha256" in line):
            raise TransferError(f"{self._path}: damaged: start anew with --overwrite")
        if "target" in line:
            self._ours = all(line.get(key) == value for key, value in self._repository.items())
            if self._ours and line["target"] == self._target:
                self.begun, self.head, self.committing = True, line.get("head"), False
        elif not self._ours:
            pass
        elif "file" in line:
            self.uploaded[line["file"]] = line["sha256"]
        elif "lost" in line:
            self.uploaded.pop(line["lost"], None)
        else:
            self.committing = True
