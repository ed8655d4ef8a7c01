"""A model on the Hub as the files of a checkpoint: downloaded when they are needed, or read by byte ranges."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock
from typing import Literal

from streammerge.checkpoints.files import Files, LocalFolder
from streammerge.checkpoints.source import LocalFile, Part, Source
from streammerge.errors import TransferError
from streammerge.hub.downloads import Downloads
from streammerge.hub.ranges import Lanes, RangeFile
from streammerge.hub.remote import Remote, Tally
from streammerge.hub.repository import Pinned, resolve

# cache   weight files are downloaded into huggingface_hub's cache, one ahead of the one being read
# stream  of weight files only the byte ranges that are needed are read, every time they are
HubMode = Literal["cache", "stream"]

_MOST_BYTES = 100_000_000  # of a file that is fetched into memory
_AT_ONCE = 8  # headers that are fetched at a time


def hub_files(id: str, revision: str | None, mode: HubMode, progress: bool) -> tuple[Files, str]:
    """The files of a model on the Hub, and the commit they are pinned to.

    Nothing is written anywhere before a tensor or a file is asked for. What the cache holds is taken from there;
    without a Hub, everything.

    Args:
        id: organisation and name.
        revision: branch, tag or commit; None: the main branch.
        mode: how weights are read.
        progress: show the progress of downloads on a terminal.

    Raises:
        CheckpointError: no such repository or revision, or no access to it.
        TransferError: it can neither be reached nor is it in the cache.
    """
    tally = Tally()
    pinned = resolve(id, revision, tally)
    if pinned.sizes is None:
        cached = CachedModel(pinned.snapshot, id)
        if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in cached.top()):
            raise cached.absent("*.safetensors")
        return cached, pinned.commit
    return HubFiles(pinned, pinned.sizes, mode, progress, tally), pinned.commit


class CachedModel(LocalFolder):
    """What the cache holds of a model, where the Hub cannot be asked for more."""

    def has(self, name: str) -> bool:
        """Raises TransferError for a file that is not in the cache: whether there is one, nobody can tell."""
        if not super().has(name):
            raise self.absent(name)
        return True

    def absent(self, name: str) -> TransferError:
        return TransferError(f"{self.where(name)}: not in the local cache, and the Hub cannot be reached (offline?)")


class HubFiles(Files):
    """The files of a pinned repository; use through `hub_files`."""

    def __init__(
        self, pinned: Pinned, sizes: Mapping[str, int | None], mode: HubMode, progress: bool, tally: Tally
    ) -> None:
        self.id, self.pinned, self.mode = pinned.id, pinned, mode
        self._sizes, self._tally = sizes, tally
        self._lanes = Lanes()
        self._texts: dict[str, bytes] = {}
        self._downloads = Downloads(pinned, sizes, self.where, progress, self._lanes.stop)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock = Lock()  # of the scratch folder and what goes into it

    @property
    def transferred(self) -> int:
        return self._tally.total

    def has(self, name: str) -> bool:
        return name in self._sizes

    def top(self) -> list[str]:
        return [name for name in self.names() if "/" not in name]

    def names(self) -> list[str]:
        return sorted(self._sizes)

    def text(self, name: str) -> bytes:
        if name not in self._texts:
            cached = self.pinned.cached(name)
            self._texts[name] = cached.read_bytes() if cached else self._fetch(name)
        return self._texts[name]

    def open(self, names: Mapping[str, int]) -> dict[str, Source]:
        def one(name: str) -> Source:
            cached = self.pinned.cached(name)
            if cached is not None:
                return LocalFile(cached, self.where(name))
            ranges = RangeFile(self._remote(name), self._lanes, names[name])
            return ranges if self.mode == "stream" else CacheFile(ranges, self._downloads, name)

        with ThreadPoolExecutor(_AT_ONCE, "streammerge-headers") as pool:
            self._downloads.order = list(names)
            return dict(zip(names, pool.map(one, names), strict=True))

    def path(self, name: str) -> Path:
        cached = self.pinned.cached(name)
        if cached is not None:
            return cached
        if self.mode == "cache":
            return self._downloads.path(name)
        return self._scratch_path(name)

    def folder_with(self, *patterns: str) -> Path:
        """A temporary folder, for the cache may not be writable, and a plan may not write there."""
        for name in self.top():
            if not name.endswith(".index.json") and any(fnmatch(name, pattern) for pattern in patterns):
                self._scratch_path(name)
        with self._lock:
            return self._folder()

    def length(self, name: str) -> int:
        return self._sizes[name] or 0

    def size(self, name: str) -> int:
        known = self._sizes[name] or 0
        return 0 if self.pinned.cached(name) or name in self._texts else known

    def close(self) -> None:
        self._lanes.close()
        with self._lock:
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def _remote(self, name: str) -> Remote:
        return Remote(self.pinned.url(name), f"model {self.id}", self.where(name), self._tally)

    def _fetch(self, name: str) -> bytes:
        return self._remote(name).body(_MOST_BYTES, self._lanes.stop, self._sizes[name])

    def _scratch_path(self, name: str) -> Path:
        with self._lock:
            path = self._folder() / name
            if not path.is_file():
                cached = self.pinned.cached(name)
                content = self._texts.get(name) or (cached.read_bytes() if cached else self._fetch(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return path

    def _folder(self) -> Path:
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="streammerge-")
        return Path(self._scratch.name)


class CacheFile(Source):
    """A weight file that is downloaded into the cache when it is first read, and the next one behind it.

    Its header and samples are read by byte ranges until then.
    """

    def __init__(self, ranges: RangeFile, downloads: Downloads, name: str) -> None:
        self.where, self.size, self.missing = ranges.where, ranges.size, ranges.size
        self._ranges, self._downloads, self._name = ranges, downloads, name
        self._local: LocalFile | None = None
        self._lock = Lock()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._file().read_into(buffer, offset)

    def sample(self, parts: Sequence[Part]) -> None:
        (self._local or self._ranges).sample(parts)

    def sample_bytes(self, parts: Iterable[tuple[int, int]]) -> int:
        return 0 if self._local else self._ranges.sample_bytes(parts)

    def header(self) -> bytes:
        return self._ranges.header()

    def will_need(self, offset: int, count: int) -> None:
        if self._local:
            self._local.will_need(offset, count)
        else:
            self._downloads.start(self._name)

    def close(self) -> None:
        if self._local:
            self._local.close()

    def _file(self) -> LocalFile:
        with self._lock:
            if self._local is None:
                path = self._downloads.path(self._name)
                local = LocalFile(path, self.where)
                if local.size != self.size:
                    local.close()
                    raise TransferError(
                        f"{self.where}: {local.size} bytes in the cache, {self.size} on the Hub: delete {path} there"
                    )
                self._local, self.missing = local, 0
            return self._local
