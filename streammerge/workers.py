"""Threads that each run torch single-threaded: no barriers, and bytes that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import local
from typing import Self, TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One torch thread per worker: the workers are the parallelism, and sums are cut the same way always."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Workers:
    """Runs pieces of work that do not depend on one another. Use as a context manager.

    Args:
        count: how many threads; one does the work in the calling thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "streammerge") if count > 1 else None
        self._own = local()

    def run(self, function: Callable[[_Item], object], items: Iterable[_Item]) -> None:
        """Call the function on every item, in any order; the first error stops the rest."""
        if self._pool is None:
            for item in items:
                function(item)
            return
        futures = [self._pool.submit(function, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def scratch(self, use: str, like: Tensor, *shape: int) -> Tensor:
        """Memory of the calling thread for one use, with the dtype and device of `like`: kept, never cleared."""
        count = torch.Size(shape).numel()
        key = f"{use} {like.dtype} {like.device}"
        kept: Tensor | None = getattr(self._own, key, None)
        if kept is None or kept.numel() < count:
            kept = torch.empty(count, dtype=like.dtype, device=like.device)
            setattr(self._own, key, kept)
        return kept[:count].view(shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
