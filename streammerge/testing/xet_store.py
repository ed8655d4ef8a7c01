"""The Xet objects of the loopback Hub: xorbs on disk, and which of their chunks make which file."""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from streammerge.testing.store import Blobs
from streammerge.testing.xet import Chunk, Term, XetFile, read_chunk_index, unpack_chunk


class XetStore:
    """Xorbs by hash; files by Xet hash and by SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrived = Blobs(folder / "arrived")
        self._lock = Lock()
        self.by_hash: dict[str, XetFile] = {}
        self.by_sha256: dict[str, XetFile] = {}
        self._chunks: dict[str, list[Chunk]] = {}

    def path(self, xorb: str) -> Path:
        return self.folder / xorb

    def add_xorb(self, xorb: str, chunks: Iterator[bytes]) -> bool:
        """Keep a xorb's bytes as they are; whether it is new. Raises ValueError for what is no xorb."""
        arrived = self._arrived.path(self._arrived.add(chunks))
        with self._lock:  # the same xorb may arrive twice at once
            if xorb in self._chunks:
                arrived.unlink(missing_ok=True)
                return False
            self._chunks[xorb] = read_chunk_index(arrived)
            arrived.replace(self.path(xorb))
            return True

    def add_file(self, file: XetFile) -> None:
        """Raises ValueError for a file that needs chunks which are not there."""
        for term in file.terms:
            if term.stop > len(self._chunks.get(term.xorb, ())):
                raise ValueError(f"file {file.hash} needs chunks of xorb {term.xorb} that were not uploaded")
        self.by_hash[file.hash] = self.by_sha256[file.sha256] = file

    def chunks(self, term: Term) -> list[Chunk]:
        return self._chunks[term.xorb][term.start : term.stop]

    def unpack(self, file: XetFile) -> Iterator[bytes]:
        """A file's bytes, chunk by chunk."""
        for term in file.terms:
            with self.path(term.xorb).open("rb") as xorb:
                for chunk in self.chunks(term):
                    xorb.seek(chunk.start)
                    yield unpack_chunk(xorb.read(chunk.stop - chunk.start))

    def part(self, file: XetFile, start: int, stop: int) -> tuple[list[Term], int]:
        """The terms that hold the bytes [start, stop), cut at chunks, and how far into the first one they begin."""
        terms: list[Term] = []
        position, skipped = 0, 0
        for term in file.terms:
            first, last, size = term.stop, term.start, 0
            for number, chunk in enumerate(self.chunks(term), term.start):
                if position < stop and position + chunk.size > start:
                    skipped = skipped if terms or size else start - position
                    first, last, size = min(first, number), number + 1, size + chunk.size
                position += chunk.size
            if size:
                terms.append(Term(term.xorb, first, last, size))
        return terms, skipped
