"""The text of a journal. An unfinished folder may come from a stranger, so that nothing in it is believed unseen."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.checkpoints.layout import Shard
from streammerge.errors import OutputExistsError

BEFORE_ANYTHING = {"lock", "journal", "uploads"}  # in a work folder: the writer's journal, and the ledger of a push


def parse_journal(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The entries of the intact lines, up to the first that does not check out, and how many bytes those take."""
    entries: list[dict[str, Any]] = []
    intact = 0
    for line in raw.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not (line.endswith(b"\n") and text.startswith(b"{") and checksum == b"%08x" % zlib.crc32(text)):
            break
        try:
            entries.append(json.loads(text))
        except (ValueError, RecursionError):  # none of ours, whatever its checksum
            break
        intact += len(line)
    return entries, intact


def identity_of(lines: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What the bytes of the unfinished run depend on, from the first line of a writer's journal.

    Raises:
        OutputExistsError: it is none, with the option that mends it.
    """
    identity = lines[0].get("identity", {})
    if not isinstance(identity, dict):
        raise _damaged(folder)
    return identity


def require_nothing_done(work: Path, folder: Path) -> None:
    """Refuse a work folder whose journal does not say whose work it holds: a Fisher of hours, maybe.

    Raises:
        OutputExistsError: with the option that mends it.
    """
    if {path.name for path in work.iterdir()} - BEFORE_ANYTHING:
        raise _damaged(folder)


def check_journal(lines: Iterable[Mapping[str, Any]], shards: Sequence[Shard], folder: Path) -> None:
    """Refuse a writer's journal with an intact line, after the first, that no writer of these shards has written.

    Raises:
        OutputExistsError: with the option that mends it.
    """
    files = {shard.file: {info.name for info in shard.tensors} for shard in shards}
    names = set[str]().union(*files.values())
    if not all(_is_ours(line, files, names) for line in lines):
        raise _damaged(folder)


def _damaged(folder: Path) -> OutputExistsError:
    return OutputExistsError(
        f"output folder {folder} holds an unfinished run with a damaged journal: start anew with --overwrite, or "
        "choose another --out"
    )


def _is_ours(line: Mapping[str, Any], files: Mapping[str, set[str]], names: set[str]) -> bool:
    if "redo" in line:
        return isinstance(line["redo"], str) and line["redo"] in files
    tensors, sums = line.get("tensors"), line.get("sums")
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        return False
    if "file" not in line:
        if not isinstance(sums, dict) or sums.keys() != tensors.keys():
            return False
        return all(type(value) is int for value in sums.values()) and tensors.keys() <= names
    file, size, digest = line["file"], line.get("bytes"), line.get("sha256")
    known = isinstance(file, str) and type(size) is int and isinstance(digest, str)
    return known and tensors.keys() == files.get(file)
