"""What every command prints: a text or JSON, on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streammerge.errors import StreammergeError, TransferError
from streammerge.text import visible


def show(value: Any, done: str = "") -> None:
    """Print it; `done` is what is complete nevertheless where that fails."""
    with printed(done):
        print(safe_lines(value) if isinstance(value, str) else json.dumps(value, indent=2))


@contextmanager
def printed(done: str = "") -> Iterator[None]:
    """What is printed within this has arrived after it.

    Raises:
        TransferError: standard output is closed, or on a disk that is full; what comes after it is not printed.
        BrokenPipeError: nobody reads it any more, and there is no more to say.
    """
    after = f"; {done}" if done else ""
    try:
        yield
        if sys.stdout is None:  # as Python has it where the process was started with it closed
            raise TransferError(f"standard output is closed{after}")
        sys.stdout.flush()
    except StreammergeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries once more as it ends
        if isinstance(error, BrokenPipeError) and not done:
            raise
        raise TransferError(f"standard output cannot be written: {error.strerror}{after}") from error


def safe_lines(text: str) -> str:
    """What goes to the terminal: nothing in it but our own line ends drives it, see `visible`."""
    return "\n".join(map(visible, text.split("\n")))
