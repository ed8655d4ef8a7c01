"""What the benchmarks share: a command measured from outside, runs made in turn, the machine named."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from mmap import mmap
from pathlib import Path
from statistics import median
from typing import Any, Self

# A small process in between: the kernel lets what is measured begin with the peak memory of whoever starts it. Where
# that has processes of its own, memory they share is counted once (Pss), and of pages of files those of the one that
# has most: others have torch's libraries too. A look takes about 10 ms of each.
_BETWEEN = """
import json, os, select, subprocess, sys, time
from pathlib import Path

def family(pid):
    children = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(member for child in children for member in family(int(child)))]

def parts(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["Pss_Anon"], sizes["Rss"] - sizes["Anonymous"]

looks = float(sys.argv[1])
start, peak = time.perf_counter(), 0
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
over = os.pidfd_open(process.pid)
while looks and not select.select([over], [], [], looks)[0]:
    try:
        members = family(process.pid)
        if len(members) > 1:
            anonymous, of_files = zip(*map(parts, members))
            peak = max(peak, sum(anonymous) + max(of_files))
    except (OSError, KeyError):
        pass  # one of them has just ended: another look will do
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - start
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, max(peak, usage.ru_maxrss) / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class CommandFailed(SystemExit):
    """A command that was to be measured ended with an error; the message is its last line."""


@dataclass(frozen=True)
class Usage:
    """What a process took, its start and imports included.

    Attributes:
        wall: seconds from start to end.
        cpu: processor seconds, user and system, of all threads and processes.
        peak: MiB resident at most: of the largest process (VmHWM), or of all together where they were looked at.
    """

    wall: float
    cpu: float
    peak: float


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None, looks: float = 0.0) -> Usage:
    """Run a command to its end; its standard output is dropped.

    Args:
        looks: seconds from one look at the memory of all its processes to the next, which slow it down; 0: none.

    Raises:
        CommandFailed: it ended with another status than 0.
    """
    between = [sys.executable, "-c", _BETWEEN, str(looks), *command]
    done = subprocess.run(between, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CommandFailed(f"{' '.join(command)}: exit status {done.returncode}: {said[-1] if said else ''}")
    return Usage(*json.loads(done.stdout))


def merging(command: Sequence[str], models: Sequence[Path], out: Path, several: bool) -> Callable[[], Usage]:
    """What runs a merge once, inputs in the page cache, and removes what it wrote.

    Args:
        several: it has processes of its own; the first time it is run once more, for the memory of all together.
    """
    peaks: list[float] = []

    def once(looks: float = 0.0) -> Usage:
        warm(models)
        try:
            return measure(command, looks=looks)
        finally:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    def run() -> Usage:
        if several and not peaks:
            peaks.append(once(looks=0.05).peak)
        usage = once()
        return replace(usage, peak=max(usage.peak, *peaks)) if peaks else usage

    return run


@dataclass(frozen=True)
class Runs:
    """Several runs of the same."""

    usages: tuple[Usage, ...]

    @property
    def wall(self) -> float:
        return median(usage.wall for usage in self.usages)

    @property
    def cpu(self) -> float:
        return median(usage.cpu for usage in self.usages)

    @property
    def peak(self) -> float:
        """The largest, not the median: it is a bound that is claimed."""
        return max(usage.peak for usage in self.usages)

    @property
    def walls(self) -> str:
        """The median wall time, and the range where there are several."""
        walls = [usage.wall for usage in self.usages]
        spread = f" ({min(walls):.1f} to {max(walls):.1f})" if len(walls) > 1 else ""
        return f"{self.wall:.1f} s{spread}"

    def over(self, other: Self) -> float:
        """The median, over the rounds, of the ratio of wall times: those of one round met the same machine."""
        return median(a.wall / b.wall for a, b in zip(self.usages, other.usages, strict=False))

    def as_json(self) -> list[dict[str, float]]:
        return [asdict(usage) for usage in self.usages]


def in_turn(
    contenders: Mapping[str, Callable[[], Usage]], rounds: int, slow: float, say: Callable[[str], object]
) -> dict[str, Runs]:
    """Run every contender once, then every one again: A B C A B C.

    Args:
        rounds: how often.
        slow: seconds; what takes longer runs once.
        say: called with a line on each run.
    """
    found: dict[str, list[Usage]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            if not found[name] or found[name][0].wall <= slow:
                usage = run()
                found[name].append(usage)
                say(f"round {number + 1}: {name}: {usage.wall:.1f} s, {usage.cpu:.1f} s of processor time")
    return {name: Runs(tuple(usages)) for name, usages in found.items()}


def warm(folders: Sequence[Path]) -> None:
    """Read every weight file, so that it lies in the page cache as far as that holds it; and let nothing be dirty.

    Before that, touch as much free memory as a process takes that holds them all and writes them again. A virtual
    machine may hand what is free back to its host, and fetching it again costs more than all else: measured, 0.3 to
    6 s for one and the same file of 3 GB.
    """
    os.sync()
    paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    touch_memory(2 * sum(path.stat().st_size for path in paths))
    buffer = bytearray(4 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def touch_memory(most: int) -> None:
    """Write to every page of `most` bytes, or of three quarters of what is free, and free them."""
    size = min(most, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * 3 // 4)
    ones = b"1" * (1 << 20)
    with mmap(-1, max(size, len(ones))) as memory:
        for _ in range(len(memory) // len(ones)):
            memory.write(ones)


def processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """The machine, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.platform()}"


def write_json(path: Path | None, values: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")
