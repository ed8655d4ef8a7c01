"""What an interrupted run left behind: the word of its journal, checked against its files.

The lines of a journal, after the first one (the identity), in the order of their time:

- `{"tensors": {name: entry}, "sums": {name: checksum}}`: these tensors are on disk, in shards that may not be finished.
- `{"file", "bytes", "sha256", "tensors"}`: this shard is finished.
- `{"redo": file}`: what the lines above say of this shard is void; it is made anew.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.checksum import add, part_sum
from streammerge.checkpoints.layout import Shard

Entry = dict[str, Any]


@dataclass
class Leftover:
    """What an earlier run left.

    Attributes:
        finished: file -> line of every finished shard that is intact.
        complete: file -> {tensor name: entry} of every other shard that holds complete tensors, all of them intact.
        redo: the files that the journal speaks of but that cannot be trusted.
    """

    finished: dict[str, Entry] = field(default_factory=dict)
    complete: dict[str, dict[str, Entry]] = field(default_factory=dict)
    redo: list[str] = field(default_factory=list)


def find_leftover(
    lines: Iterable[Entry], shards: Sequence[Shard], work: Path, folder: Path, elsewhere: Mapping[str, str]
) -> Leftover:
    """Read a journal's lines. Finished shards may be in `folder` already, unfinished ones are in `work`.

    Args:
        elsewhere: file -> SHA-256 of the shards that somebody else keeps: they are done with or without a file here.
    """
    finished, complete, sums = _replay(lines, shards)
    left = Leftover()
    for shard in shards:
        file = shard.file
        if file in finished:
            kept = elsewhere.get(file) == finished[file]["sha256"]
            if kept or _is_intact(finished[file], shard, (work / file, folder / file)):
                left.finished[file] = finished[file]
            else:
                left.redo.append(file)
        elif complete[file]:
            if _are_intact(work / file, shard, {name: sums[name] for name in complete[file]}):
                left.complete[file] = complete[file]
            else:
                left.redo.append(file)
    return left


def _replay(
    lines: Iterable[Entry], shards: Sequence[Shard]
) -> tuple[dict[str, Entry], dict[str, dict[str, Entry]], dict[str, int]]:
    """The line of each finished shard, the complete tensors by shard, and their checksums."""
    file_of = {info.name: shard.file for shard in shards for info in shard.tensors}
    finished: dict[str, Entry] = {}
    complete: dict[str, dict[str, Entry]] = {shard.file: {} for shard in shards}
    sums: dict[str, int] = {}
    for line in lines:
        if "redo" in line:
            finished.pop(line["redo"], None)
            complete[line["redo"]].clear()
        elif "file" in line:
            finished[line["file"]] = line
        else:
            for name, entry in line["tensors"].items():
                complete[file_of[name]][name] = entry
            sums |= line["sums"]
    return finished, complete, sums


def _is_intact(line: Mapping[str, Any], shard: Shard, places: Iterable[Path]) -> bool:
    path = next((place for place in places if place.exists()), None)
    return path is not None and _has_size(path, shard.size) and _sha256(path) == line["sha256"]


def _are_intact(path: Path, shard: Shard, sums: Mapping[str, int]) -> bool:
    """Whether the bytes of these tensors are what was written."""
    if not _has_size(path, shard.size):
        return False
    tensors = [info for info in shard.tensors if info.name in sums]
    return all(_checksum(path, info.start, info.stop) == sums[info.name] for info in tensors)


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and disk.status(path).st_size == size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(path, 0, disk.status(path).st_size):
        digest.update(piece)
    return digest.hexdigest()


def _checksum(path: Path, start: int, stop: int) -> int:
    total = position = 0
    for piece in _pieces(path, start, stop):
        total = add(total, part_sum(memoryview(piece), position))
        position += len(piece)
    return total


def _pieces(path: Path, start: int, stop: int) -> Iterator[bytes]:
    fd = disk.open_to_read(path)
    try:
        while start < stop and (piece := disk.read_at(fd, min(disk.PIECE, stop - start), start)):
            yield piece
            start += len(piece)
    finally:
        disk.close(fd)
