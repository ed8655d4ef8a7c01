"""How much memory this process may have, and what is said when it ran out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from streammerge.errors import MemoryBudgetError
from streammerge.units import format_memory

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 of cgroups says about 2**63 for none


def memory_limits(root: Path = _ROOT) -> dict[str, int]:
    """What bounds this process's memory, in bytes, by name: more than the least of it can never be had.

    The machine's memory with its swap, the control group's limit with its swap (both versions), and the limits of the
    process on its data and address space.

    Args:
        root: where `proc` and `sys` are.
    """
    limits = {}
    if machine := _machine(root):
        limits["this machine has"] = machine
    if group := _control_group(root):
        limits["the control group allows"] = group
    if sys.platform != "win32":
        import resource

        for name, text in (("RLIMIT_DATA", "ulimit -d allows"), ("RLIMIT_AS", "ulimit -v allows")):
            soft, _ = resource.getrlimit(getattr(resource, name))
            if soft != resource.RLIM_INFINITY:
                limits[text] = soft
    return limits


def available_memory(root: Path = _ROOT) -> int | None:
    """What could be had now without swapping; None where the system does not say."""
    return _meminfo(root).get("MemAvailable")


class Resident(NamedTuple):
    """Memory of this process that is in RAM, in bytes.

    Attributes:
        now, peak: all of it, now and the most since it began.
        own: what belongs to no file, now; what is shared with the process it is a fork of counts.
    """

    now: int
    peak: int
    own: int


def resident_memory(root: Path = _ROOT) -> Resident | None:
    """How much memory this process takes; None where the system does not say."""
    found = _sizes(root / "proc/self/status")
    keys = ("VmRSS", "VmHWM", "RssAnon")
    return Resident(*(found[key] for key in keys)) if found.keys() >= set(keys) else None


def require_memory(peak: int, doing: str, advice: str) -> None:
    """Refuse work that cannot fit, whatever else runs.

    Args:
        peak: what the process is planned to take.

    Raises:
        MemoryBudgetError: it is more than there can be.
    """
    by, limit = min(memory_limits().items(), key=lambda item: item[1], default=("", _UNLIMITED))
    if peak > limit:
        raise MemoryBudgetError(f"{doing} takes {format_memory(peak)} of memory, {by} {format_memory(limit)}: {advice}")


_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|can't start new thread|std::bad_alloc")


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """What runs out of memory, in whatever library, ends in one line that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_torch = type(error).__name__ == "OutOfMemoryError"  # of a GPU; torch may not be imported
        if not (isinstance(error, MemoryError) or of_torch or _OUT_OF_MEMORY.search(str(error))):
            raise
        raise MemoryBudgetError(f"{doing} ran out of memory: {advice}") from error


def _machine(root: Path) -> int | None:
    found = _meminfo(root)
    if "MemTotal" in found:
        return found["MemTotal"] + found.get("SwapTotal", 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no swap is known of
    except (AttributeError, ValueError, OSError):
        return None


def _meminfo(root: Path) -> dict[str, int]:
    return _sizes(root / "proc/meminfo")


def _sizes(path: Path) -> dict[str, int]:
    """The lines of a file that give a size, in kB, as bytes."""
    lines = [line.partition(":") for line in _read(path).splitlines()]
    parts = {key: value.split() for key, _, value in lines}
    return {key: int(words[0]) << 10 for key, words in parts.items() if words[1:] == ["kB"] and words[0].isdigit()}


def _control_group(root: Path) -> int | None:
    """The least limit of the groups the process is in, swap included; None where there is none."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _upwards(root / "sys/fs/cgroup", path):
                memory, swap = (_read(folder / name).strip() for name in ("memory.max", "memory.swap.max"))
                if memory.isdigit():
                    limits.append(int(memory) + (int(swap) if swap.isdigit() else _UNLIMITED if swap else 0))
        elif "memory" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/memory", path):
                memory, both = (
                    _read(folder / name).strip() for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
                )
                if memory.isdigit():
                    limits.append(int(both) if both.isdigit() else int(memory))
    least = min(limits, default=_UNLIMITED)
    return least if least < _UNLIMITED else None


def _upwards(top: Path, path: str) -> list[Path]:
    """The group's folder and those above it; in a container the group may be the top itself."""
    folder = top / path.strip("/")
    return [place for place in (folder, *folder.parents) if place == top or top in place.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
