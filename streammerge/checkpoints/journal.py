"""An append-only journal: one checksummed line per finished unit, on disk before `append` returns.

A line is `crc32 json`. Reading stops at the first line that does not check out, so that a torn write can
only make work be done again, never be believed.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.journal_text import parse_journal


class Journal:
    """The journal of one run; `entries` holds what an earlier run left, then what this one appended."""

    def __init__(self, path: Path) -> None:
        self.entries, intact = parse_journal(disk.read_file(path) if path.exists() else b"")
        new = not path.exists()
        self._fd = disk.open_to_append(path)
        try:
            disk.set_length(self._fd, intact)
            if new:
                disk.sync_folder(path.parent)  # a line is worth nothing in a file without a name
        except BaseException:
            self.close()
            raise

    def append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        disk.append(self._fd, line)
        disk.sync(self._fd)
        self.entries.append(entry)

    def close(self) -> None:
        if self._fd >= 0:
            disk.close(self._fd)
            self._fd = -1
