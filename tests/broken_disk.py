"""A disk that fails where a test wants it to: it takes the place of `os` in `streammerge.checkpoints.disk`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

OF_FILES = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate")
OF_FOLDERS = ("replace", "rename", "unlink", "mkdir", "rmdir")
WRITES = OF_FILES + OF_FOLDERS
READS = ("read", "pread", "preadv", "stat", "scandir")


class Call(NamedTuple):
    """One call to the system: its name and the file it is about."""

    name: str
    path: str


class BrokenDisk:
    """Passes everything on to `os`, but the calls in `names` of which one fails.

    Args:
        names: calls that are counted. Opening a file counts as a write where it may make the file, else as a read.
        at: the number of the call that fails; None: none does.
        code: the errno it fails with.
        watch: called before every call that is counted.

    Nothing waits for a real disk: what is to be made durable is only counted.

    Attributes:
        calls: those that were counted, in order.
        failed: the one that failed.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        at: int | None = None,
        code: int = 0,
        watch: Callable[[Call], object] = lambda call: None,
    ) -> None:
        self._names, self._at, self._code, self._watch = names, at, code, watch
        self._lock = Lock()
        self.calls: list[Call] = []
        self.failed: Call | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return lambda path, flags, *mode: self._call(real, "open", path, flags, *mode)
        if name not in self._names:
            return (lambda fd: None) if name in ("fsync", "fdatasync") else real
        return lambda *arguments: self._call(real, name, *arguments)

    def _call(self, real: Callable[..., Any], name: str, file: int | Path, *rest: Any) -> Any:
        if name == "open" and bool(rest[0] & os.O_CREAT) != (self._names == WRITES):
            return real(file, *rest)
        with self._lock:
            call = Call(name, _path(file))
            fails = self._at == len(self.calls)
            self.calls.append(call)
            self._watch(call)
        if fails:
            self.failed = call
            raise OSError(self._code, os.strerror(self._code))
        return None if name in ("fsync", "fdatasync") else real(file, *rest)


def _path(file: int | Path) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)


class ShortDisk:
    """Reads and writes at most so many bytes at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        shortened: dict[str, Callable[..., Any]] = {
            "read": lambda fd, count: real(fd, min(count, self._most)),
            "pread": lambda fd, count, offset: real(fd, min(count, self._most), offset),
            "preadv": lambda fd, buffers, offset: real(fd, [buffers[0][: self._most]], offset),
            "write": lambda fd, data: real(fd, data[: self._most]),
            "pwrite": lambda fd, data, offset: real(fd, data[: self._most], offset),
        }
        if name not in shortened:
            return real
        self.calls += 1
        return shortened[name]
