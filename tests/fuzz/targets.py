"""The fuzz targets: what reads bytes of strangers, each as a function of those bytes.

A target returns, or lets a StreammergeError out; anything else is a bug. `run` checks that, and that the message can be
shown.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint
from streammerge.checkpoints.files import Files
from streammerge.checkpoints.header import TensorInfo, encode_header, header_length, parse_header
from streammerge.checkpoints.journal_text import check_journal, identity_of, parse_journal
from streammerge.checkpoints.layout import plan_shards
from streammerge.checkpoints.output import files_of_manifest
from streammerge.checkpoints.resume import find_leftover
from streammerge.checkpoints.source import Source
from streammerge.checkpoints.weight_files import INDEX_FILE
from streammerge.errors import HeaderError, StreammergeError
from streammerge.hub.ledger import Ledger
from streammerge.hub.settings import PushSettings
from streammerge.recipe import make_recipe, parse_recipe, resolve_method
from streammerge.schema import build
from streammerge.verify import read_manifest

LONGEST_MESSAGE = 12_000  # a name or value of 1,000 characters, each shown as an escape of up to ten
SHARDS = plan_shards([("a", "F32", (2,)), ("b", "F32", (2,)), ("c", "BF16", (3,))], 8)
PARTS = {"1.safetensors": ("a", "b"), "2.safetensors": ("c",)}


def run(target: Callable[[bytes], None], data: bytes) -> str | None:
    """Run a target: the message of the refusal, None where there is none."""
    try:
        target(data)
    except StreammergeError as error:
        message = str(error)
        assert len(message) < LONGEST_MESSAGE, message
        assert all(line.isprintable() for line in message.split("\n")), message
        return message
    return None


def header(content: bytes) -> None:
    """A safetensors file. Where its first eight bytes are wrong, what follows is a header nevertheless."""
    try:
        length = header_length(content[:8], len(content), "model m, file f")
    except HeaderError:
        with suppress(StreammergeError):
            parse_header(content[8:], len(content), "f", "model m, file f")
        raise
    parse_header(content[8 : 8 + length], len(content), "f", "model m, file f")


def index(content: bytes) -> None:
    """The index of a model whose two files are as they should be."""
    Checkpoint.of(_Memory(content))


def recipe(content: bytes) -> None:
    """A YAML recipe, up to the method with its parameters."""
    resolve_method(make_recipe(parse_recipe(content, "recipe r")), 1000)


def journal(content: bytes) -> None:
    """The journal of an unfinished run, as it is, and with every line's checksum put right."""
    for raw in (content, b"".join(map(signed, content.split(b"\n")))):
        lines, intact = parse_journal(raw)
        assert intact <= len(raw)
        if lines:
            identity_of(lines, Path("out"))
            check_journal(lines[1:], SHARDS, Path("out"))
            find_leftover(lines[1:], SHARDS, Path("/nowhere"), Path("/nowhere"), {})


def ledger(content: bytes) -> None:
    """The journal of an unfinished push, with every line's checksum put right."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "uploads").write_bytes(b"".join(map(signed, content.split(b"\n"))))
        Ledger(Path(folder), build(PushSettings, {"repository": "a/b"}, "push"), "http://hub").close()


def manifest(content: bytes) -> None:
    """The manifest of a finished merge, as verify and --overwrite read it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_FILE).write_bytes(content)
        for name in files_of_manifest(Path(folder), MANIFEST_FILE) or ():
            assert Path(folder) in (Path(folder) / name).resolve().parents
        read_manifest(Path(folder))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, index, recipe, journal, ledger, manifest)
}


def signed(line: bytes) -> bytes:
    """A line of a journal with the right checksum; nothing for an empty one."""
    text = line[9:] if re.match(rb"[0-9a-f]{8} ", line) else line
    return b"%08x %s\n" % (zlib.crc32(text), text) if text else b""


def file_with(raw: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of that header."""
    return struct.pack("<Q", len(raw)) + raw + data


class _Memory(Files):
    """A model of two files and an index, in memory."""

    id = "m"

    def __init__(self, content: bytes) -> None:
        self._index = content

    def has(self, name: str) -> bool:
        return name in (*PARTS, INDEX_FILE, "config.json")

    def top(self) -> list[str]:
        return self.names()

    def names(self) -> list[str]:
        return sorted((*PARTS, INDEX_FILE, "config.json"))

    def text(self, name: str) -> bytes:
        return self._index if name == INDEX_FILE else json.dumps({"model_type": "x"}).encode()

    def open(self, names: Mapping[str, int]) -> dict[str, Source]:
        assert set(names) <= set(PARTS)
        return {name: _Part(PARTS[name]) for name in names}

    def length(self, name: str) -> int:
        return len(self.text(name))

    def path(self, name: str) -> Path:
        raise AssertionError(name)

    def folder_with(self, *patterns: str) -> Path:
        raise AssertionError(patterns)


class _Part(Source):
    """A file of one-byte tensors."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.where = "model m, file f"
        infos = [TensorInfo(name, "U8", (1,), "", start, start + 1) for start, name in enumerate(names)]
        self._content = encode_header(infos) + bytes(len(names))
        self.size = len(self._content)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._content[offset : offset + len(buffer)]

    def close(self) -> None: ...
