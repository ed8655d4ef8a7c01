"""Many inputs through every fuzz target: only our errors, how long the slowest took, how much memory all took.

Run as `python tests/fuzz/bulk.py [target...]`; `tests/fuzz/test_bulk.py` asserts what it prints.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.generate import GENERATORS
from fuzz.targets import TARGETS, run

COUNTS = {"header": 100_000, "index": 10_000, "recipe": 10_000, "journal": 10_000, "ledger": 2_000, "manifest": 10_000}


@dataclass(frozen=True)
class Figures:
    """What happened to a target's inputs: how many were refused, CPU seconds of the slowest, bytes above the start."""

    inputs: int
    refused: int
    slowest: float
    memory: int
    total: float


def bulk(name: str, count: int, seed: int = 0) -> Figures:
    """Run a target on `count` generated inputs. An exception that is not ours goes through, with the input as a note.

    Time is this process's CPU time, which other processes do not lengthen, the garbage collector's included: what was
    there before is frozen, so that it collects our garbage alone. Memory is the kernel's high-water mark of resident
    memory (VmHWM), set back at the start.
    """
    target, generate = TARGETS[name], GENERATORS[name]
    for number in range(50):
        run(target, generate(Random(-1 - number)))  # caches of regular expressions, of pydantic, of the allocator
    gc.collect()
    gc.freeze()
    start = _reset_peak()
    refused, slowest, total = 0, 0.0, 0.0
    for number in range(count):
        data = generate(Random(f"{seed} {number}"))
        before = time.process_time()
        try:
            refused += run(target, data) is not None
        except BaseException as error:
            error.add_note(f"{name} {seed} {number}: {data!r}")
            raise
        taken = time.process_time() - before
        slowest, total = max(slowest, taken), total + taken
    gc.unfreeze()
    return Figures(count, refused, slowest, _peak() - start, total)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    for name in sys.argv[1:] or COUNTS:
        found = bulk(name, COUNTS[name])
        print(
            f"{name:9} {found.inputs:7} inputs, {found.refused:6} refused, slowest {1000 * found.slowest:.1f} ms, mean "
            f"{1e6 * found.total / found.inputs:.0f} us, memory +{found.memory / 2**20:.1f} MiB",
            flush=True,
        )
