"""The hidden folder a run works in: locked against other writers, with the journal of what is done."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from streammerge.checkpoints import disk
from streammerge.checkpoints.journal import Journal
from streammerge.checkpoints.output import WORK_DIR
from streammerge.errors import OutputExistsError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = "lock"
JOURNAL_FILE = "journal"


class WorkFolder:
    """The work folder in an output folder, this writer's alone until `close` or the end of the process.

    Args:
        folder: the output folder; made if it is not there.
        fresh: remove what an earlier run left.
        label: what messages say is at work, where they are not to name the folder.

    Attributes:
        path: the work folder.
        journal: its journal.

    Raises:
        OutputExistsError: another writer, of this or of another process, holds it.
    """

    def __init__(self, folder: Path, *, fresh: bool, label: str | None = None) -> None:
        self.path = folder / WORK_DIR
        self._lock = _locked(self.path, label)
        try:
            if fresh:
                self._empty()
            self.journal = Journal(self.path / JOURNAL_FILE)
        except BaseException:
            disk.close(self._lock)
            raise

    def remove(self) -> None:
        """Remove the folder. The lock goes last, so that the next writer finds everything or nothing."""
        self._empty()
        disk.remove(self.path / LOCK_FILE)
        with suppress(OSError):  # the next writer is in already
            disk.remove_folder(self.path)

    def close(self) -> None:
        """Let others in."""
        self.journal.close()
        if self._lock >= 0:
            disk.close(self._lock)
            self._lock = -1

    def _empty(self) -> None:
        """Remove all but the lock; the journal last, which knows what has been done so far."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == JOURNAL_FILE):
            if path.is_dir() and not path.is_symlink():
                disk.remove_tree(path)
            elif path.name != LOCK_FILE:
                disk.remove(path)


def _locked(work: Path, label: str | None) -> int:
    """A descriptor of the folder's lock file, locked."""
    path = work / LOCK_FILE
    while True:
        disk.make_folder(work)
        fd = disk.open_to_write(path)
        try:
            _flock(fd, work.parent, label)
            with suppress(FileNotFoundError):
                if os.path.samestat(disk.status(fd), disk.status(path)):
                    return fd
        except BaseException:
            disk.close(fd)
            raise
        disk.close(fd)  # its owner removed it between our opening and our locking: try again


def _flock(fd: int, folder: Path, label: str | None) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        told = f"output folder {folder} is being written by another process: wait for it, or choose another --out"
        raise OutputExistsError(f"another {label} is at work: wait for it" if label else told) from error
    except OSError:  # a file system without locks
        pass
