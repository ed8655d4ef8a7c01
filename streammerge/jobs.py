"""Numbered jobs, done a few at a time: by threads, or by forks of this process, which share no interpreter lock.

Both take the same: `begin(tell)` makes what does one job after another, once per worker; what it tells comes to `told`.
A fork inherits all that there was when it began, as it was then; what it changes stays in it. So whatever is to last
is told, or written to a file that was open before.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import connection, current_process, get_context
from multiprocessing.connection import Connection
from threading import Event, Lock
from typing import Any, NoReturn

from streammerge.errors import MemoryBudgetError
from streammerge.host import resident_memory

Tell = Callable[[Any], object]
Begin = Callable[[Tell], Callable[[int], object]]

_PR_SET_PDEATHSIG = 1  # of prctl.h


def can_fork() -> bool:
    """Whether forks may do jobs here: on Linux, and not in a process that multiprocessing forbids to have any."""
    return sys.platform == "linux" and not current_process().daemon


def in_threads(count: int, jobs: int, begin: Begin, told: Tell, stop: Event) -> None:
    """Do the jobs in order, as threads are free; the first error sets `stop`, and no job is begun any more.

    Args:
        count: how many threads at most.
        jobs: how many jobs.
        begin: see above; called in each thread.
        told: called with all that is told, by several threads at once.
        stop: once it is set no job is begun.
    """
    numbers, lock = iter(range(jobs)), Lock()

    def loop() -> None:
        do = begin(told)
        while not stop.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                do(number)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(count, "streammerge") as pool:
        try:
            for future in [pool.submit(loop) for _ in range(min(count, jobs))]:
                future.result()
        finally:
            stop.set()


def in_forks(count: int, jobs: int, begin: Begin, told: Tell, held: Callable[[int], object]) -> None:
    """Do the jobs in order, as forks are free; the first error, or signal, ends all forks at once.

    Args:
        count: how many forks at most.
        jobs: how many jobs.
        begin: see above; called in each fork. What it tells must be picklable.
        told: called with all that is told, in the calling thread.
        held: called each time with the bytes that all forks hold besides what they share with this process; but for
            the few MiB of the interpreter's that each copies because it writes to them.

    Raises:
        MemoryBudgetError: a fork was killed, or cannot be had.
    """
    numbers = iter(range(jobs))
    with ExitStack() as stack:
        forks: dict[Connection, Any] = {}
        sizes: dict[Connection, int] = {}
        stack.callback(held, 0)
        stack.enter_context(_no_garbage_among_what_is_shared())
        for _ in range(min(count, jobs)):
            ours, process = _fork(begin, stack)
            forks[ours] = process
        while forks:
            ready = connection.wait([*forks])
            for ours in [ours for ours in forks if ours in ready]:
                kind, value, sizes[ours] = _received(ours, forks[ours])
                held(sum(sizes.values()))
                if kind == "told":
                    told(value)
                elif kind == "failed":
                    raise value
                else:
                    number = next(numbers, None)
                    ours.send(number)
                    if number is None:
                        del forks[ours]


@contextmanager
def _no_garbage_among_what_is_shared() -> Iterator[None]:
    """To look for it is to write to it, and a page that is written to is shared no more: measured, 45 MiB."""
    if gc.get_freeze_count():  # somebody else's doing, and theirs to undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _fork(begin: Begin, stack: ExitStack) -> tuple[Connection, Any]:
    """A fork that waits for the number of a job; what ends it is left to the stack."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    stack.callback(ours.close)
    process = context.Process(target=_serve, args=(theirs, begin, os.getpid()), name="streammerge", daemon=True)
    with warnings.catch_warnings():
        # Other threads may hold locks that nobody lets go of in the fork. It takes none of theirs: it reads and writes
        # files by their descriptors, computes with one torch thread, and never returns to what called us.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        try:
            process.start()
        except OSError as error:
            raise MemoryBudgetError(f"no worker process can be begun ({error.strerror}): give --threads 1") from error
    stack.callback(_end, process)
    theirs.close()
    return ours, process


def _end(process: Any) -> None:
    process.kill()
    process.join()
    process.close()


def _received(ours: Connection, process: Any) -> tuple[str, Any, int]:
    """What a fork says next: "told" and what, "free" for the next job, or "failed" and why; and the bytes it holds."""
    try:
        kind, value, size = pickle.loads(ours.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join()
        number = -process.exitcode
        name = signal.Signals(number).name if number > 0 else f"exit status {process.exitcode}"
        raise MemoryBudgetError(
            f"a worker process was ended ({name}), as the system does when memory runs out: give a smaller --max-ram "
            "or fewer --threads; the same command goes on where it was"
        ) from None
    return kind, value, size


def _serve(theirs: Connection, begin: Begin, parent: int) -> NoReturn:
    """In the fork: do jobs until there is none, or the process that asks for them is no more."""
    signal.set_wakeup_fd(-1)  # the parent's
    for number in (signal.SIGINT, signal.SIGTERM):  # which often go to all processes of a group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    shared = _own_memory()
    try:

        def send(kind: str, value: Any = None) -> None:
            message = (kind, value, _own_memory() - shared)
            theirs.send_bytes(pickle.dumps(message))  # no tensor in shared memory, as Connection.send would

        try:
            do = begin(lambda message: send("told", message))
            send("free")
            while (number := theirs.recv()) is not None:
                do(number)
                send("free")
        except BaseException as error:
            send("failed", _portable(error))
    except OSError:
        os._exit(1)  # nobody listens any more
    finally:
        os._exit(0)


def _own_memory() -> int:
    memory = resident_memory()
    return memory.own if memory else 0


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent, with where it came from."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.add_note("\n".join(error.__notes__))
        return other
    return error
