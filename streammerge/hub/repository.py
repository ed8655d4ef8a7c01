"""A model repository on the Hub at one commit: its files, from huggingface_hub's cache where they are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

from streammerge.checkpoints.json_text import parse_object
from streammerge.errors import CheckpointError, HeaderError, TransferError
from streammerge.hub.remote import Remote, Tally
from streammerge.hub.tries import PassingError
from streammerge.names import unsafe_name

_MOST_LISTING_BYTES = 100_000_000
FIRST_TRIES = 4  # at the first contact with a Hub, which may simply not be there


@dataclass(frozen=True)
class Pinned:
    """A repository at a commit.

    Attributes:
        id: organisation and name.
        asked: the revision the user named; None: the main branch.
        commit: what that was, once and for all.
        sizes: the files, with their sizes in bytes where the Hub tells them; None: the Hub could not be asked.
    """

    id: str
    asked: str | None
    commit: str
    sizes: Mapping[str, int | None] | None

    @property
    def snapshot(self) -> Path:
        """Where the files of this commit lie in the cache, as far as they are there."""
        return _cache_folder(self.id) / "snapshots" / self.commit

    def cached(self, name: str) -> Path | None:
        """The file in the cache; None where it is not there."""
        path = self.snapshot / name
        return path if path.is_file() else None

    def url(self, name: str) -> str:
        """Where the Hub serves the file."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.id}/resolve/{self.commit}/{quote(name)}"

    def remember(self) -> None:
        """Have the cache know which commit the revision was, for later runs without the Hub."""
        path = _cache_folder(self.id) / "refs" / (self.asked or "main")
        if self.asked != self.commit and not (path.is_file() and path.read_text("utf-8") == self.commit):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.commit, "utf-8")


def resolve(id: str, revision: str | None, tally: Tally) -> Pinned:
    """Ask the Hub, once, what a revision is and which files it has; offline, the cache.

    Raises:
        CheckpointError: no such repository or revision, or no access to it.
        TransferError: the Hub cannot be reached, and the cache does not know the revision.
    """
    from huggingface_hub import constants

    model = f"model {id}" + (f"@{revision}" if revision else "")
    if constants.is_offline_mode():
        return _from_cache(id, revision, model)
    revision_path = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{constants.ENDPOINT}/api/models/{id}{revision_path}?blobs=true"
    try:
        body = Remote(url, model, model, tally).body(_MOST_LISTING_BYTES, Event(), tries=FIRST_TRIES)
    except TransferError as error:
        if not isinstance(error.__cause__, PassingError):
            raise
        return _from_cache(id, revision, model, str(error.__cause__))
    try:
        return Pinned(id, revision, *_read_listing(parse_object(body, model), model))
    except (HeaderError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{model}: what answers there is no Hub: is HF_ENDPOINT right?") from None


def _read_listing(info: Mapping[str, Any], model: str) -> tuple[str, dict[str, int | None]]:
    """Commit, and files with their sizes. Both come to be parts of paths on this machine."""
    if not re.fullmatch(r"[0-9a-f]{6,64}", info["sha"]):
        raise ValueError(info["sha"])
    sizes: dict[str, int | None] = {}
    for entry in info["siblings"]:
        name, size = entry["rfilename"], entry.get("size")
        if reason := unsafe_name(name):
            raise CheckpointError(f"{model}: the Hub lists a file {name[:200]!r}, which is not fetched: {reason}")
        sizes[name] = size if type(size) is int and size >= 0 else None
    return info["sha"], sizes


def _from_cache(id: str, revision: str | None, model: str, why: str = "offline?") -> Pinned:
    known = _cache_folder(id) / "refs" / (revision or "main")
    commit = known.read_text("utf-8").strip() if known.is_file() else revision or ""
    pinned = Pinned(id, revision, commit, None)
    if not commit or not pinned.snapshot.is_dir():
        raise TransferError(f"{model}: not in the local cache, and the Hub cannot be reached ({why})")
    return pinned


def _cache_folder(id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{id.replace('/', '--')}"
