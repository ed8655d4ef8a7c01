"""What the tests of pushing share: users, a merge, and looks at the Hub."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tiny_models import Models

from streammerge.testing import Hub, User

TOKEN = "hf_markerMarkerMarkerMarkerMarker12"
READER, STRANGER = "hf_reader", "hf_stranger"
USERS = {TOKEN: User("me", ("org",)), READER: User("reader", ("org",), can_write=False), STRANGER: User("stranger")}

Merge = Callable[..., dict[str, Any]]
Found = TypeVar("Found")


def recipe(pair: Models, **values: Any) -> dict[str, Any]:
    """Several shards of a few tensors each."""
    plain = {"base": str(pair.base), "models": [str(pair.ft)], "method": "task_arithmetic"}
    return {**plain, "max_shard_bytes": "6KB", **values}


def folder_content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pushed(hub: Hub, repository: str = "org/new", revision: str = "main") -> dict[str, bytes]:
    """Every file of a revision but the one the Hub itself makes."""
    names = hub.files(repository, revision)
    return {name: hub.read(repository, name, revision) for name in names if name != ".gitattributes"}


def history(hub: Hub, repository: str = "org/new", revision: str = "main") -> list[str]:
    """Titles of a branch's commits, newest first."""
    return [commit.title for commit in hub.repositories[repository].history(revision)]


def uploads(hub: Hub) -> list[str]:
    """The SHA-256 of every object whose bytes were taken, in order; parts count each."""
    puts = [e.path for e in hub.record if e.method == "PUT" and e.host == "storage" and e.status == 200]
    return [path.split("/")[4] for path in puts]


def sampled(folder: Path, work: Callable[[], Found]) -> tuple[Found, list[set[str]]]:
    """What a call returns, and what shards of a merge lay below a folder meanwhile, looked at over and over."""
    seen: list[set[str]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            walk = [(Path(place), names) for place, _, names in os.walk(folder)]
            walk = [w for w in walk if w[0].name == ".streammerge" and not w[0].parent.name.startswith("fisher")]
            shards = {name for _, names in walk for name in names if name.endswith(".safetensors")}
            if not seen or seen[-1] != shards:
                seen.append(shards)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        return work(), seen
    finally:
        done.set()
        watcher.join()
