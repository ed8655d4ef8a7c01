"""The formats of Xet storage, as far as a server needs them: hashes, shards, xorbs and their chunks. Pure.

A file is a list of terms, each a run of chunks in one *xorb*; a *shard* is how a client says so. A chunk is stored
plain, as an LZ4 frame, or as an LZ4 frame of its bytes grouped by position modulo four.

References: https://huggingface.co/docs/xet (shard and xorb formats);
https://github.com/lz4/lz4/tree/dev/doc (frame and block formats).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENTRY_BYTES = 48
CHUNK_HEADER_BYTES = 8
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_BOOKEND = b"\xff" * 32


@dataclass(frozen=True)
class Term:
    """The chunks [start, stop) of a xorb, and how many bytes they are when unpacked."""

    xorb: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class XetFile:
    """How to put a file together. Attributes: its Xet hash, its SHA-256, its terms in order."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


@dataclass(frozen=True)
class Chunk:
    """Where a chunk begins and ends in its xorb, header included, and its unpacked size."""

    start: int
    stop: int
    size: int


def hash_text(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers of 64 bits, in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_shard(raw: bytes) -> Iterator[XetFile]:
    """The files that an uploaded shard describes.

    Raises:
        ValueError: not a shard, or a file without its SHA-256.
    """
    if raw[:14] != b"HFRepoMetaData" or struct.unpack_from("<Q", raw, 32) != (2,):
        raise ValueError("not a shard of version 2")
    position = ENTRY_BYTES
    while raw[position : position + 32] != _BOOKEND:
        flags, count = struct.unpack_from("<II", raw, position + 32)
        if not flags & _WITH_SHA256:
            raise ValueError("the shard gives no SHA-256 for a file")
        first = position + ENTRY_BYTES
        terms = tuple(_read_term(raw, first + i * ENTRY_BYTES) for i in range(count))
        end = first + count * ENTRY_BYTES * (2 if flags & _WITH_VERIFICATION else 1)
        yield XetFile(hash_text(raw[position : position + 32]), hash_text(raw[end : end + 32]), terms)
        position = end + ENTRY_BYTES


def _read_term(raw: bytes, position: int) -> Term:
    _, size, start, stop = struct.unpack_from("<IIII", raw, position + 32)
    return Term(hash_text(raw[position : position + 32]), start, stop, size)


def read_chunk_index(path: Path) -> list[Chunk]:
    """Where the chunks of a xorb lie. What follows the last chunk, if anything, is another part of the format.

    Raises:
        ValueError: not a xorb.
    """
    chunks: list[Chunk] = []
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position < size:
            header = file.read(CHUNK_HEADER_BYTES)
            if header[0] != 0:
                break
            stop = position + CHUNK_HEADER_BYTES + int.from_bytes(header[1:4], "little")
            chunks.append(Chunk(position, stop, int.from_bytes(header[5:8], "little")))
            file.seek(position := stop)
    if not chunks or position > size:
        raise ValueError("not a xorb")
    return chunks


def unpack_chunk(raw: bytes) -> bytes:
    """A chunk's bytes, given it with its header."""
    scheme, packed = raw[4], raw[CHUNK_HEADER_BYTES:]
    if scheme == 0:
        return packed
    unpacked = _unpack_lz4_frame(packed)
    return unpacked if scheme == 1 else _ungroup(unpacked)


def _ungroup(grouped: bytes) -> bytes:
    """Bytes 0, 4, 8... came first, then 1, 5, 9..., and so on."""
    plain, position = bytearray(len(grouped)), 0
    for lane in range(4):
        count = len(range(lane, len(grouped), 4))
        plain[lane::4] = grouped[position : position + count]
        position += count
    return bytes(plain)


def _unpack_lz4_frame(frame: bytes) -> bytes:
    flags = frame[4]
    position = 6 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0) + 1
    plain = bytearray()
    while size := int.from_bytes(frame[position : position + 4], "little"):
        block = frame[position + 4 : position + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            plain += block
        else:
            _unpack_lz4_block(block, plain)
        position += 4 + len(block) + (4 if flags & 0x10 else 0)
    return bytes(plain)


def _unpack_lz4_block(block: bytes, plain: bytearray) -> None:
    """Append a block's bytes: literals, and copies of what came before, which may overlap with themselves."""
    position = 0
    while True:
        token = block[position]
        count, position = _read_length(block, position + 1, token >> 4)
        plain += block[position : position + count]
        position += count
        if position >= len(block):
            return
        distance = block[position] | block[position + 1] << 8
        count, position = _read_length(block, position + 2, token & 15)
        source = plain[-distance:]
        plain += (source * ((count + 4) // distance + 1))[: count + 4]


def _read_length(block: bytes, position: int, length: int) -> tuple[int, int]:
    """A length of 15 goes on in the next bytes, until one is not 255."""
    more = 255 if length == 15 else 0
    while more == 255:
        more = block[position]
        length, position = length + more, position + 1
    return length, position
