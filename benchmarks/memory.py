"""Peak memory of the whole process for each method on a synthetic pair of a real shape.

    python benchmarks/memory.py --shape qwen2-1.5b --out benchmarks/out

Makes the pair where it is not there yet (base tied, fine-tuned untied, as in the paper's 1.5B pair), merges it
once per method through the command line, verifies each output, and prints one Markdown table. Memory is the
kernel's own account of the finished process (`ru_maxrss`); times are of one run each and only say what is long.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from make_checkpoints import SHAPES, make_pair

METHODS = ("task_arithmetic", "linear", "ties", "fim_ta", "fim_ties")


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; peak resident MiB and processor seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for pair and merges")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoints")
    arguments = parser.parse_args()
    pair = arguments.out / arguments.shape
    if not (pair / "ft").is_dir():
        make_pair(arguments.shape, pair, ft_tie=False)
    ours = [sys.executable, "-m", "streammerge"]
    print(f"{arguments.shape}, {os.cpu_count()} cores, {platform.platform()}, torch {version('torch')}\n")
    print("| method | peak memory | planned | processor time | verified |\n|---|---|---|---|---|")
    for method in arguments.methods:
        out = arguments.out / f"{arguments.shape}-{method}"
        shutil.rmtree(out, ignore_errors=True)
        models = ["--base", str(pair / "base"), "--ft", str(pair / "ft"), "--method", method]
        plan = subprocess.run([*ours, "plan", *models, "--json"], check=True, capture_output=True, text=True)
        planned = json.loads(plan.stdout)["peak_host_bytes"] / 2**20
        peak, seconds = measured([*ours, "merge", *models, "--out", str(out), "--quiet"])
        measured([*ours, "verify", str(out), "--quiet"])
        print(f"| `{method}` | {peak:.0f} MiB | {planned:.0f} MiB | {seconds:.0f} s | yes |", flush=True)
        if not arguments.keep:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
