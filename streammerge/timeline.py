"""Where the time and the memory of a job go, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from time import monotonic

from streammerge.host import resident_memory

_SECONDS = 0.1  # from one look at the memory to the next


@dataclass(frozen=True)
class Phase:
    """One phase of a job that is over.

    Attributes:
        seconds: how long it took, by a clock that nobody sets.
        peak_bytes: the most resident memory of the process and its forks in it; None where the system does not say.
    """

    name: str
    seconds: float
    peak_bytes: int | None


class Timeline:
    """The phases of a job, one after another.

    The peak of a phase that is the process's highest so far is exact, the system keeps it; that of another phase, or
    with forks, is the highest of looks ten times a second.

    Attributes:
        phases: those that are over.
        forks: bytes that forks hold now besides what they share with this process.
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.forks = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done in the context belongs to the phase; recorded when it ends without an error."""
        begun, before = monotonic(), resident_memory()
        seen, over = [before.now if before else 0], Event()

        def look() -> None:
            while not over.wait(_SECONDS):
                if memory := resident_memory():
                    seen.append(max(seen.pop(), memory.now + self.forks))

        looking = Thread(target=look, name="streammerge-memory", daemon=True)
        if before is not None:
            looking.start()
        try:
            yield
        finally:
            over.set()
            if before is not None:
                looking.join()
        after = resident_memory()
        peak = None
        if before is not None and after is not None:
            peak = max(seen[0], after.peak if after.peak > before.peak else after.now)
        self.phases.append(Phase(name, monotonic() - begun, peak))
