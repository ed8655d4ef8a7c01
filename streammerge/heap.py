"""What glibc's allocator keeps of freed memory, kept small. Does nothing on other systems."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_ARENA_MAX = -8  # of malloc.h


def one_heap() -> None:
    """Have all threads share one heap from now on.

    Left alone glibc keeps a heap per thread and the largest that each ever was: measured on a Fisher pass of the 1.5B
    shape, half as much again.
    """
    if libc := _glibc():
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Hand what is free of the heap back to the system.

    To give every large buffer back at once would cost a tenth of the time, in page faults; now and then costs nothing.
    """
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
