"""Files of one repository into huggingface_hub's cache, by its own client: the one that is needed, and one ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Semaphore, Thread
from typing import Any

from streammerge.errors import TransferError
from streammerge.hub.repository import Pinned
from streammerge.hub.tries import PassingError, hub_errors, persist
from streammerge.hub.xet import has_xet, limit_xet_memory
from streammerge.units import format_size

_TEXTS = (".json", ".txt", ".model", ".jinja", ".py")  # what transformers reads of a model besides its weights
_MOST_TEXT_BYTES = 100_000_000
_MOST_BY_HTTP = 50_000_000_000
_CHUNK_BYTES = 1 << 20  # of a plain download; ten times as much by default, and several of it at once
_at_once = Semaphore(2)  # of the whole process: every download holds tens of megabytes in the client


class Downloads:
    """Any thread may ask for a file; two that ask for the same one wait for the same download.

    Args:
        pinned: the repository.
        sizes: all its files.
        where: how messages name a file.
        progress: show the client's bar on a terminal.
        stop: set where nothing more is wanted.

    Attributes:
        order: the weight files in the order in which they will be needed.
    """

    def __init__(
        self, pinned: Pinned, sizes: Mapping[str, int | None], where: Callable[[str], str], progress: bool, stop: Event
    ) -> None:
        self._pinned, self._where, self._progress, self._stop = pinned, where, progress, stop
        self._sizes = sizes
        self._texts = [
            name
            for name, size in sizes.items()
            if "/" not in name and name.endswith(_TEXTS) and (size or 0) <= _MOST_TEXT_BYTES
        ]
        self.order: list[str] = []
        self._running: dict[str, Future[Path]] = {}
        self._lock = Lock()
        self._begun = False

    def path(self, name: str) -> Path:
        """Wait for a file. Of the weights, the next one is downloaded meanwhile.

        Raises:
            CheckpointError: no access to it.
            TransferError: it cannot be downloaded, or not be written into the cache.
        """
        path = self.start(name).result()
        if name in self.order:
            self._start_next(name)
        return path

    def start(self, name: str) -> Future[Path]:
        """Begin a download, unless it has begun."""
        with self._lock:
            if name not in self._running:
                future: Future[Path] = Future()
                self._running[name] = future
                # A thread that dies with the process: a download cannot be stopped, and Ctrl-C must not wait for it.
                Thread(target=self._work, args=(name, future), name="streammerge-download", daemon=True).start()
            return self._running[name]

    def _start_next(self, name: str) -> None:
        for other in self.order[self.order.index(name) + 1 :]:
            if self._pinned.cached(other) is None:
                self.start(other)
                return

    def _work(self, name: str, future: Future[Path]) -> None:
        try:
            self._begin()
            future.set_result(self._download(name))
        except BaseException as error:
            future.set_exception(error)

    def _begin(self) -> None:
        """Before the first one: what a later run without the Hub will look for besides."""
        with self._lock:
            first, self._begun = not self._begun, True
        if first:
            _limit_buffers()
            with _cache_errors(self._where("config.json")):
                self._pinned.remember()
            for text in self._texts:
                self._download(text)

    def _download(self, name: str) -> Path:
        where = self._where(name)
        if (self._sizes[name] or 0) > _MOST_BY_HTTP and not has_xet():
            raise TransferError(
                f"{where}: the Hub serves files above {format_size(_MOST_BY_HTTP)} by Xet only: install hf_xet and "
                "give more --max-ram, or take --hub-mode stream"
            )

        def attempt() -> Path:
            from huggingface_hub import hf_hub_download

            with _at_once, _cache_errors(where), hub_errors(f"model {self._pinned.id}", where):
                return Path(
                    hf_hub_download(
                        self._pinned.id, name, revision=self._pinned.commit, tqdm_class=_bar(self._progress)
                    )
                )

        return persist(lambda: where, attempt, self._stop)


@contextmanager
def _cache_errors(where: str) -> Iterator[None]:
    """An OSError with a number is the disk's; one without is the client's, about what it received."""
    try:
        yield
    except TransferError:
        raise
    except OSError as error:
        if error.errno is None:
            raise PassingError("the download is not whole") from error
        raise TransferError(
            f"{where}: cannot be written into the Hub's cache ({error.strerror}): set HF_HOME to a folder with room, "
            "or take --hub-mode stream"
        ) from error


def _limit_buffers() -> None:
    """Before the client's first transfer."""
    from huggingface_hub import constants

    limit_xet_memory()
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _CHUNK_BYTES)


def _bar(progress: bool) -> Any:
    from huggingface_hub.utils.tqdm import tqdm as hub_bar

    class TerminalBar(hub_bar):
        """The client's bar, but only on a terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            shown = {"disable": None if progress else True}
            super().__init__(*args, **{**options, **shown})  # type: ignore[no-untyped-call]  # tqdm's

    return TerminalBar
