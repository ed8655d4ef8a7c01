"""A file of a model that is pushed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import RepoFile


@dataclass(frozen=True)
class PushedFile:
    """A file of the model: its bytes, or where they lie, or None for a shard that only the Hub still has."""

    content: bytes | Path | None
    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes | Path) -> PushedFile:
        """A small file."""
        raw = content if isinstance(content, bytes) else content.read_bytes()
        return cls(content, len(raw), hashlib.sha256(raw).hexdigest())

    def is_same(self, there: RepoFile) -> bool:
        """Whether the repository's file has the same content."""
        if there.lfs is not None:
            return there.lfs.sha256 == self.sha256
        if self.content is None or there.size != self.size:
            return False
        raw = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return there.blob_id == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
