"""Merge under a hard limit of the operating system: what importing takes, plus `--max-ram`, plus 64 MiB.

    python benchmarks/hard_limit.py --out benchmarks/out                      # the 1.5B shape, TIES
    python benchmarks/hard_limit.py --shape tiny --max-ram 64MiB --slack 16   # MiB beyond the promise

Makes the checkpoints where they are not there yet, and merges them once under each limit, in a process that has
imported everything, reads its own size from the kernel, and forbids itself to grow by more than the promise:

- `RLIMIT_DATA`: private writable memory, touched or not: heaps, buffers, threads' stacks. Measured as `VmData`.
- `RLIMIT_AS`: all of the address space, also what is only set aside, as for every thread's heap. Measured as `VmSize`.

Beyond the limit an allocation fails, and so does the merge. Each result is verified. A line of the table is of one run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from make_checkpoints import SHAPES
from memory import OURS, make_models, options

from streammerge import METHODS
from streammerge.units import parse_size

MIB = 1 << 20
LIMITS = {"RLIMIT_DATA": "VmData", "RLIMIT_AS": "VmSize"}

CHILD = """
import json, resource, sys
import streammerge.engine, streammerge.cli

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) << 10

limit, measure, more, report, *command = sys.argv[1:]
imported = status(measure)
allowed = imported + int(more)
resource.setrlimit(getattr(resource, limit), (allowed, allowed))
code = streammerge.cli.main(command)
with open(report, "w") as file:
    json.dump({"imported": imported, "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}, file)
sys.exit(code)
"""


def merge_limited(limit: str, more: int, command: list[str], report: Path) -> dict[str, int] | None:
    """Run a command of ours in a process that may grow by `more` bytes; bytes imported and peak, None: it failed."""
    arguments = [limit, LIMITS[limit], str(more), str(report), *command]
    if subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.DEVNULL).returncode:
        return None
    values: dict[str, int] = json.loads(report.read_text())
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for checkpoints and merges")
    parser.add_argument("--method", choices=METHODS, default="ties")
    parser.add_argument("--max-ram", default="256MiB")
    parser.add_argument("--slack", type=int, default=64, help="MiB beyond the promise")
    parser.add_argument("--limits", nargs="+", choices=LIMITS, default=list(LIMITS))
    arguments = parser.parse_args(argv)
    folder = arguments.out / arguments.shape
    make_models(arguments.shape, folder)
    budget = parse_size(arguments.max_ram)
    print(
        f"{arguments.shape}, {arguments.method}, --max-ram {budget / MIB:.0f} MiB, limit {arguments.slack} MiB above\n"
    )
    print("| limit | imported | may grow by | peak resident memory | result |")
    print("|---|---|---|---|---|")
    failed = False
    for limit in arguments.limits:
        out, report = arguments.out / f"limited-{limit.lower()}", arguments.out / f"{limit.lower()}.json"
        shutil.rmtree(out, ignore_errors=True)
        called = [*options(arguments.method, folder), "--max-ram", str(budget), "--out", str(out), "-q"]
        more = budget + arguments.slack * MIB
        found = merge_limited(limit, more, ["merge", *called], report)
        verified = found and subprocess.run([*OURS, "verify", str(out), "-q"], stdout=subprocess.DEVNULL)
        failed |= not verified or verified.returncode != 0
        imported, resident = (f"{found[key] / MIB:.0f} MiB" if found else "-" for key in ("imported", "resident"))
        told = "failed" if not verified or verified.returncode else "verified"
        print(f"| {limit} | {imported} | {more / MIB:.0f} MiB | {resident} | {told} |", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        report.unlink(missing_ok=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
