"""Where the time of a Fisher pass goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


class Phases:
    """Seconds and bytes per phase: read, copy, forward, head, backward, square, write, state.

    Reading runs beside the rest, so the phases may add up to more than the wall time. On a GPU, work is queued and
    finished later; with `exact` each phase waits for its own, which makes the pass slower.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.seconds: dict[str, float] = {}
        self.bytes_read = 0
        self._lock = Lock()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.exact and torch.cuda.is_available():
                torch.cuda.synchronize()
            with self._lock:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def read(self, count: int) -> None:
        with self._lock:
            self.bytes_read += count
