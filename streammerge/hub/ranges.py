"""Byte ranges of a file on the Hub, straight into the caller's buffers, over several connections."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING

from streammerge.checkpoints.header import header_length
from streammerge.checkpoints.source import SAMPLE_GAP, Part, Source, coalesce
from streammerge.errors import TransferError
from streammerge.hub.remote import Remote
from streammerge.hub.tries import PassingError, persist

if TYPE_CHECKING:
    from httpx2 import Response

LANES = 4  # connections of one model
LEAST_PIECE, MOST_PIECE = 2 << 20, 32 << 20  # bytes of one request, where more is wanted
PROGRESS_BYTES = 1 << 16  # a try that failed after so many is not counted
SLOW_SECONDS, SLOW_RATE = 30.0, 2048.0  # after so long, a connection must have given so many bytes per second

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)$")


class Lanes:
    """The connections of one model: what is handed to `run` is shared out among them. Any thread may call it."""

    def __init__(self) -> None:
        self.stop = Event()
        self._pool = ThreadPoolExecutor(LANES, "streammerge-hub")

    def run(self, jobs: Sequence[_Piece]) -> None:
        """Return when all are done; the first error, when none is running any more."""
        if len(jobs) == 1:
            jobs[0].fetch(self.stop)
            return
        failed = Event()
        futures = [self._pool.submit(self._one, job, failed) for job in jobs]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _one(self, job: _Piece, failed: Event) -> None:
        if failed.is_set():
            return
        try:
            job.fetch(self.stop)
        except BaseException:
            failed.set()
            raise

    def close(self) -> None:
        self.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class RangeFile(Source):
    """A file on the Hub of which only the bytes that are asked for are ever fetched; nothing is kept.

    Every response must be 206 with the right Content-Range and length. What failed is asked for again from the last
    good byte on.

    Args:
        remote: the file.
        lanes: the connections.
        guess: about how many bytes its header has; 0: not known.

    Raises:
        HeaderError: it is no safetensors file.
        CheckpointError, TransferError: it cannot be read.
    """

    streamed = True

    def __init__(self, remote: Remote, lanes: Lanes, guess: int = 0) -> None:
        self.where, self._remote, self._lanes = remote.where, remote, lanes
        self._header: bytes | None = self._read_header(max(guess, 8))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.read_many([(offset, buffer)])

    def read_many(self, parts: Sequence[Part]) -> None:
        self._fetch(parts, 0)

    def sample(self, parts: Sequence[Part]) -> None:
        self._fetch(parts, SAMPLE_GAP)

    def sample_bytes(self, parts: Iterable[tuple[int, int]]) -> int:
        ranges = coalesce(((start, start + count) for start, count in parts if count), SAMPLE_GAP)
        return sum(stop - start for start, stop in ranges)

    def header(self) -> bytes:
        """Read when the file was opened, and handed out once."""
        found, self._header = self._header, None
        return super().header() if found is None else found

    def close(self) -> None:
        """The connections are the model's."""

    def _fetch(self, parts: Sequence[Part], gap: int) -> None:
        wanted = sorted(((at, buffer) for at, buffer in parts if len(buffer)), key=lambda part: part[0])
        if not wanted:
            return
        jobs = []
        first = 0
        for start, stop in coalesce(((at, at + len(buffer)) for at, buffer in wanted), gap):
            if start < 0 or stop > self.size:
                raise TransferError(f"{self.where}: ends at byte {self.size}, asked for {start}-{stop - 1}")
            last = bisect_left(wanted, stop, first, key=lambda part: part[0])
            for begin, end in _pieces(start, stop):
                jobs.append(_Piece(self._remote, begin, end, self.size, _cut(wanted[first:last], begin, end)))
            first = last
        self._lanes.run(jobs)

    def _read_header(self, guess: int) -> bytes:
        """Its size, and its header in one request where the guess is large enough."""
        head = bytearray(guess)
        first = _Piece(self._remote, 0, guess, None, [(0, memoryview(head))])
        first.fetch(self._lanes.stop)
        self.size = first.total
        length = header_length(bytes(head[: min(8, self.size)]), self.size, self.where)
        raw = bytearray(length)
        known = min(max(min(guess, self.size) - 8, 0), length)
        raw[:known] = head[8 : 8 + known]
        self._fetch([(8 + known, memoryview(raw)[known:])], 0)
        return bytes(raw)


class _Piece:
    """One request: consecutive bytes of a file, scattered over buffers.

    Args:
        remote: the file.
        start, stop: the bytes.
        total: the file's size; None: to be found out, and the file may end before `stop`.
        parts: where the bytes go, sorted by offset.
    """

    def __init__(self, remote: Remote, start: int, stop: int, total: int | None, parts: Sequence[Part]) -> None:
        self._remote, self._at, self._stop, self._parts = remote, start, stop, parts
        self._known = total
        self._begin = start  # of the current try
        self._first = 0  # the first part that is not full
        self.total = total or 0

    def fetch(self, stop: Event) -> None:
        """Raises CheckpointError or TransferError naming model, file and range."""
        persist(self._where, lambda: self._attempt(stop), stop, lambda: self._at - self._begin >= PROGRESS_BYTES)

    def _where(self) -> str:
        return f"{self._remote.where}, bytes {self._at}-{self._stop - 1}"

    def _attempt(self, stop: Event) -> None:
        self._begin = self._at
        if self._at == self._stop:
            return
        began = time.monotonic()
        with self._remote.get({"Range": f"bytes={self._at}-{self._stop - 1}"}) as response:
            self._check(response)
            for chunk in response.iter_raw() if self._at < self._stop else ():
                self._take(chunk)
                if stop.is_set():
                    return  # nobody waits for it
                spent = time.monotonic() - began
                if spent > SLOW_SECONDS and self._at - self._begin < SLOW_RATE * spent:
                    raise PassingError(f"{self._at - self._begin} bytes in {spent:.0f} seconds")
        if self._at < self._stop:
            raise PassingError(f"the answer ended at byte {self._at}")

    def _check(self, response: Response) -> None:
        """Refuse any response but the one that was asked for, before a byte of it is read."""
        match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if response.status_code == 416 and self._known is None and match is not None and match[3] == "0":
            self._stop = 0  # an empty file
            return
        if response.status_code != 206:
            raise PassingError(f"the range was ignored (answered {response.status_code} instead of 206)")
        if match is None or match[1] is None:
            raise PassingError("the answer has no Content-Range")
        start, stop, total = int(match[1]), int(match[2]) + 1, int(match[3])
        wanted = self._stop if self._known is not None else min(self._stop, total)
        if (start, stop) != (self._at, wanted) or self._known not in (None, total):
            raise PassingError(f"the answer is of bytes {start}-{stop - 1} of {total}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise PassingError("the answer is compressed")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            raise PassingError(f"the answer is of {length} bytes instead of {stop - start}")
        self.total, self._known, self._stop = total, total, wanted

    def _take(self, chunk: bytes) -> None:
        self._remote.tally.add(len(chunk))
        if self._at + len(chunk) > self._stop:
            raise PassingError("the answer is longer than the range")
        end = self._at + len(chunk)
        for number in range(self._first, len(self._parts)):
            offset, buffer = self._parts[number]
            if offset >= end:
                break
            start, stop = max(offset, self._at), min(offset + len(buffer), end)
            if start < stop:
                buffer[start - offset : stop - offset] = chunk[start - self._at : stop - self._at]
        self._at = end
        while self._first < len(self._parts) and _end(self._parts[self._first]) <= end:
            self._first += 1


def _end(part: Part) -> int:
    return part[0] + len(part[1])


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """A range cut into about equal requests: as many as there are connections where it is long enough."""
    size = stop - start
    count = max(1, min(LANES, size // LEAST_PIECE), -(-size // MOST_PIECE))
    bounds = [start + size * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def _cut(parts: Sequence[Part], start: int, stop: int) -> list[Part]:
    """What of the sorted parts lies within a range."""
    found = []
    for offset, buffer in parts:
        first, last = max(offset, start), min(offset + len(buffer), stop)
        if first < last:
            found.append((first, buffer[first - offset : last - offset]))
    return found
