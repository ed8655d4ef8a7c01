"""The bytes of the loopback Hub: one file on disk for each content, named by its SHA-256."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

CHUNK_BYTES = 1 << 20

# The Hub stores as LFS what the .gitattributes of a new repository names, and whatever is large.
LFS_BYTES = 10 << 20
_NAMED = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
LFS_PATTERNS = _NAMED.split()
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class WrongContentError(Exception):
    """Bytes came that are not those announced."""


@dataclass(frozen=True)
class File:
    """One version of a file in a repository.

    Attributes:
        sha256: of the content, in hexadecimal; for LFS files also the object's id.
        size: bytes.
        oid: git's SHA-1 of what git stores: the content, or the LFS pointer.
        lfs: whether git stores a pointer.
    """

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub wants this file as an LFS object. Empty files never are."""
    name = path.rpartition("/")[2]
    return size > 0 and (size > LFS_BYTES or any(fnmatch(name, p) or fnmatch(path, p) for p in LFS_PATTERNS))


def lfs_file(sha256: str, size: int) -> File:
    """The file that an LFS pointer stands for."""
    return File(sha256, size, git_oid(_pointer(sha256, size)), True)


def git_oid(content: bytes) -> str:
    """The id that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Blobs:
    """Contents in a folder, each under its SHA-256; never a whole large one in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def read(self, sha256: str) -> bytes:
        return self.path(sha256).read_bytes()

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def add(self, chunks: Iterable[bytes], sha256: str | None = None) -> str:
        """Store a content; returns its SHA-256.

        Raises:
            WrongContentError: it is not the SHA-256 asked for; nothing is stored.
        """
        digest = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix="partial-")
        try:
            with open(descriptor, "wb") as partial:
                for chunk in chunks:
                    digest.update(chunk)
                    partial.write(chunk)
            found = digest.hexdigest()
            if sha256 not in (None, found):
                raise WrongContentError(f"expected SHA-256 {sha256}, found {found}")
            os.replace(name, self.path(found))
        except BaseException:
            os.unlink(name)
            raise
        return found

    def add_file(self, path: str, chunks: Iterable[bytes]) -> File:
        """Store the content of a repository's file, as LFS or not as the Hub would have it."""
        sha256 = self.add(chunks)
        size = self.path(sha256).stat().st_size
        return lfs_file(sha256, size) if is_lfs(path, size) else File(sha256, size, git_oid(self.read(sha256)), False)


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a piece at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
