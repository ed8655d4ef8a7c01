"""An append-only journal: one checksummed line per finished unit, on disk before `append` returns.

A line is `crc32 json`. Reading stops at the first line that does not check out, so that a torn write can
only make work be done again, never be believed.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from streammerge.checkpoints.journal_text import parse_journal


class Journal:
    """The journal of one run; `entries` holds what an earlier run left, then what this one appended."""

    def __init__(self, path: Path) -> None:
        self.entries, intact = parse_journal(path.read_bytes() if path.exists() else b"")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._fd, intact)
        os.lseek(self._fd, 0, os.SEEK_END)

    def append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)
        self.entries.append(entry)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
