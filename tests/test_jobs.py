"""Jobs: each is done once, in order, whoever does them; errors and deaths come through; nobody is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from streammerge.errors import IncompatibleCheckpointsError, MemoryBudgetError
from streammerge.jobs import Begin, Tell, can_fork, in_forks, in_threads

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks are of Linux")

MIB = 1 << 20


def threads(count: int, jobs: int, begin: Begin, told: Tell) -> None:
    in_threads(count, jobs, begin, told, Event())


def forks(count: int, jobs: int, begin: Begin, told: Tell) -> None:
    in_forks(count, jobs, begin, told, lambda count: None)


carriers = pytest.mark.parametrize("carrier", [threads, pytest.param(forks, marks=linux)])


@pytest.fixture(autouse=True)
def nobody_left_behind() -> Any:
    yield
    assert multiprocessing.active_children() == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@carriers
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("jobs", [0, 1, 3, 100])
def test_every_job_once_and_in_order(carrier: Callable[..., None], count: int, jobs: int) -> None:
    told: list[tuple[int, int]] = []

    def begin(tell: Tell) -> Callable[[int], object]:
        who = torch.empty(1).data_ptr() ^ os.getpid()

        def do(number: int) -> None:
            tell((who, number))
            tell((who, -number))

        return do

    carrier(count, jobs, begin, told.append)
    assert sorted(number for _, number in told) == sorted([*range(jobs), *range(0, -jobs, -1)])
    for who in {who for who, _ in told}:
        of_one = [number for other, number in told if other == who and number > 0]
        assert of_one == sorted(of_one)


@carriers
def test_those_that_are_free_go_on_while_one_is_at_work(carrier: Callable[..., None], tmp_path: Path) -> None:
    """The first job ends when the last is done, which no order could do but by going past it."""

    def begin(tell: Tell) -> Callable[[int], object]:
        def do(number: int) -> None:
            if number == 0:
                until = time.monotonic() + 30
                while not (tmp_path / "9").exists():
                    assert time.monotonic() < until
                    time.sleep(0.001)
            (tmp_path / str(number)).touch()
            tell(number)

        return do

    told: list[int] = []
    carrier(2, 10, begin, told.append)
    assert told == [*range(1, 10), 0]


@carriers
def test_the_first_error_stops_all(carrier: Callable[..., None]) -> None:
    told: list[int] = []

    def begin(tell: Tell) -> Callable[[int], object]:
        def do(number: int) -> None:
            if number == 3:
                raise IncompatibleCheckpointsError("they differ:", ["in one", "in another"])
            time.sleep(0.001)
            tell(number)

        return do

    with pytest.raises(IncompatibleCheckpointsError) as caught:
        carrier(2, 10_000, begin, told.append)
    assert caught.value.mismatches == ("in one", "in another")
    assert str(caught.value) == str(IncompatibleCheckpointsError("they differ:", ["in one", "in another"]))
    assert len(told) < 5_000


@carriers
def test_an_error_while_it_begins(carrier: Callable[..., None]) -> None:
    def begin(tell: Tell) -> Callable[[int], object]:
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        carrier(2, 3, begin, print)


class StubbornError(Exception):
    """Cannot be made from what it says."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@linux
def test_an_error_that_cannot_travel_is_told_with_where_it_was() -> None:
    def begin(tell: Tell) -> Callable[[int], object]:
        def the_job_that_fails(number: int) -> None:
            raise StubbornError(1, 2)

        return the_job_that_fails

    with pytest.raises(RuntimeError, match="StubbornError: 1 and 2") as caught:
        forks(1, 1, begin, print)
    assert "the_job_that_fails" in caught.value.__notes__[0]


@linux
def test_a_fork_that_is_killed() -> None:
    def begin(tell: Tell) -> Callable[[int], object]:
        return lambda job: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MemoryBudgetError, match=r"a worker process was ended \(SIGKILL\).*give a smaller --max-ram"):
        forks(2, 5, begin, print)


@linux
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_forks_leave_signals_to_the_process_that_began_them(signal_number: int) -> None:
    told: list[int] = []

    def begin(tell: Tell) -> Callable[[int], object]:
        def do(number: int) -> None:
            os.kill(os.getpid(), signal_number)
            tell(number)

        return do

    forks(2, 4, begin, told.append)
    assert sorted(told) == [0, 1, 2, 3]


@linux
def test_an_error_of_who_is_told_ends_the_forks() -> None:
    def begin(tell: Tell) -> Callable[[int], object]:
        def do(number: int) -> None:
            tell(number)
            time.sleep(60)

        return do

    def told(number: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        forks(2, 4, begin, told)
    assert time.monotonic() - began < 30


ORPHANS = """
import os, sys, time
from streammerge.jobs import in_forks

def begin(tell):
    def do(number):
        tell(os.getpid())
        time.sleep(60)
    return do

in_forks(2, 2, begin, lambda pid: print(pid, flush=True), lambda count: None)
"""


@linux
def test_forks_die_with_the_process_that_began_them() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        forked = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    until = time.monotonic() + 10
    while any(_is_running(pid) for pid in forked):
        assert time.monotonic() < until
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    """Whether there is such a process that is not dead already, whoever is to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
def test_what_forks_hold_is_told() -> None:
    sizes: list[int] = []

    def begin(tell: Tell) -> Callable[[int], object]:
        held = torch.ones(48 * MIB, dtype=torch.uint8)
        return lambda number: tell(int(held[number]))

    in_forks(2, 6, begin, lambda value: None, sizes.append)
    assert max(sizes) == pytest.approx(2 * 48 * MIB, abs=8 * MIB)
    assert sizes[-1] == 0


@linux
def test_not_where_multiprocessing_forbids_it() -> None:
    assert can_fork()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(can_fork()), daemon=True)
    process.start()
    assert receiver.recv() is False
    process.join()
    process.close()


@linux
def test_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    with pytest.raises(MemoryBudgetError, match="no worker process can be begun .*temporarily.*: give --threads 1"):
        forks(2, 4, lambda tell: print, print)


@linux
def test_no_garbage_is_looked_for_among_what_is_shared() -> None:
    """Nor is somebody else's freeze undone."""
    counts: list[int] = []

    def begin(tell: Tell) -> Callable[[int], object]:
        return lambda number: tell(gc.get_freeze_count())

    assert gc.get_freeze_count() == 0
    forks(1, 1, begin, counts.append)
    assert counts[0] > 10_000 and gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        forks(1, 1, begin, counts.append)
        assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.01)
    finally:
        gc.unfreeze()


@linux
def test_tensors_travel_by_value() -> None:
    """Not in shared memory, which is small in many a container."""
    told: list[torch.Tensor] = []
    forks(1, 1, lambda tell: lambda number: tell(torch.arange(3)), told.append)
    assert told[0].tolist() == [0, 1, 2] and not told[0].is_shared()
