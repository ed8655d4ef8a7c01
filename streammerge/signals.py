"""SIGINT and SIGTERM stop the command line within two seconds, whatever it is doing.

The first one raises `Stopped` in the main thread, so that what is complete is recorded, and connections and temporary
files are let go of. Python does so only between two instructions of that thread, and the threads beside it end the
piece of work they have begun: a large product, hash or fsync may take long. So a thread of its own sees the signal as
it arrives, gives all this GRACE_SECONDS, and then ends the process. That costs no more than a kill does: what is done
is in journals at all times. A second signal ends the process at once.

Only the command line does this; in a program that imports the library, signals are the program's.
"""

import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from types import FrameType
from typing import Any

GRACE_SECONDS = 1.25

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asks this process to stop.

    Attributes:
        status: what the process exits with, as shells have it: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class _Process:
    """What this process does about signals: there is one of it, as there is one handler of each signal.

    Attributes:
        again: what the command that is under way does when it is given again; None while nothing has begun.
        over: whether that has ended, with or without an error: there is nothing left to stop, or to say.
        raised: whether `Stopped` was raised.
    """

    def __init__(self) -> None:
        self.again: str | None = None
        self.over = self.raised = False
        self._saying = Lock()  # once taken it is kept: the line is printed once
        self._arrivals: socket.socket | None = None

    @property
    def watched(self) -> bool:
        return self._arrivals is not None

    def watch(self) -> None:
        """Handle the signals from now on; those that whoever started the process ignores stay ignored."""
        self._arrivals, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        Thread(target=self._end_in_time, name="streammerge-signals", daemon=True).start()
        plain = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if unraisable.exc_type is not Stopped:  # raised where Python can only print it
                plain(unraisable)

        sys.unraisablehook = hook

    def may_say(self) -> bool:
        """True for the first who asks."""
        return self._saying.acquire(blocking=False)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        del frame
        if self.again is None or self.over:
            self._end(number)
        elif not self.raised:
            self.raised = True
            raise Stopped(number)

    def _end_in_time(self) -> None:
        """Wait for a signal, and then for the grace to pass or another signal, whichever is first."""
        assert self._arrivals is not None
        number = self._next(None)
        assert number is not None
        self._next(monotonic() + GRACE_SECONDS)
        self._end(number)

    def _next(self, until: float | None) -> int | None:
        """The next signal of ours; None where none comes in time."""
        assert self._arrivals is not None
        while True:
            left = None if until is None else max(until - monotonic(), 0)
            if not select.select([self._arrivals], [], [], left)[0]:
                return None
            number = self._arrivals.recv(1)[0]
            if number in _SIGNALS:
                return number

    def _end(self, number: int) -> None:
        if not self.over and self.may_say():
            end_of_bar = "\n" if sys.stderr.isatty() else ""
            os.write(2, f"{end_of_bar}{farewell(self.again)}\n".encode())  # sys.stderr may be in use
        os._exit(128 + number)


_process = _Process()


def farewell(again: str | None) -> str:
    """What is said when a command stops: how to go on."""
    if again is None:
        return "streammerge: stopped before anything was begun"
    return f"streammerge: stopped; the same command {again}"


def take_over() -> None:
    """Handle SIGINT and SIGTERM from now on. Nothing has begun: they end the process at once."""
    if not _process.watched:
        _process.watch()


@contextmanager
def under_way(again: str) -> Iterator[None]:
    """Within this a signal raises `Stopped`; before and after, where there is nothing to undo, it ends the process.

    Args:
        again: what the same command does when it is given again, such as "begins anew".
    """
    _process.again, _process.over = again, False
    try:
        yield
    finally:
        _process.over = not _process.raised


def leave(status: int) -> None:
    """End the process if it was stopped: Python's own way out takes apart all it has imported, which takes seconds."""
    if _process.raised:
        with suppress(OSError, AttributeError):  # nobody reads it any more; None where it was closed from the start
            sys.stdout.flush()
        os._exit(status)


def say_farewell(again: str) -> None:
    """Print how to go on, unless that was said already."""
    if not _process.watched or _process.may_say():
        print(farewell(again), file=sys.stderr, flush=True)


def _is_command_line() -> bool:
    """Whether this process was started as `streammerge` or `python -m streammerge` and imports the package for that."""
    name = Path(sys.argv[0]).name if getattr(sys, "argv", None) else ""
    module = ("-m", "streammerge") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return name == "streammerge" or (name == "-m" and module)


if _is_command_line():  # `streammerge/__init__.py` imports this module first
    take_over()
