"""How long the command line takes to start: help and plan, beyond the start of the interpreter.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --runs 20 --json start_up.json

Each command is a process of its own; runs are made in turn (A B A B), with compiled modules in a folder of their own
that the first, uncounted round fills. Wall times are medians and the least of all runs; that one, or the processor's
time, is what a quiet machine takes.
`plan` plans a merge of the smallest synthetic pair, on disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from make_checkpoints import make_pair
from measuring import Runs, Usage, in_turn, machine, measure, write_json

INTERPRETER = "python -c pass"


def commands(folder: Path) -> dict[str, list[str]]:
    """What is started, by the name it has in the table."""
    base, ft = make_pair("tiny", folder / "pair", say=lambda line: None)
    models = ["--base", str(base), "--ft", str(ft)]
    lines: dict[str, list[str]] = {
        "--help": ["--help"],
        "merge --help": ["merge", "--help"],
        "methods": ["methods"],
        "plan": ["plan", *models],
        "plan, task_arithmetic": ["plan", *models, "--method", "task_arithmetic"],
    }
    ours = {f"streammerge {name}": [sys.executable, "-m", "streammerge", *words] for name, words in lines.items()}
    imports = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in ("streammerge", "torch")}
    return {INTERPRETER: [sys.executable, "-c", "pass"], **imports, **ours}


def runner(command: list[str], cache: Path) -> Callable[[], Usage]:
    environment = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
    return lambda: measure(command, environment)


def least(runs: Runs) -> float:
    return min(usage.wall for usage in runs.usages)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="rounds (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run as JSON")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        started = {name: runner(command, Path(folder) / "compiled") for name, command in commands(Path(folder)).items()}
        quiet = lambda line: None  # noqa: E731
        in_turn(started, 1, 60, quiet)
        found = in_turn(started, arguments.runs, 60, quiet)
    print(f"streammerge {version('streammerge')}, python {sys.version.split()[0]}, torch {version('torch')}")
    print(f"{machine()}, load {os.getloadavg()[1]:.1f}, {arguments.runs} runs\n")
    print("| | wall time | least | beyond the interpreter | processor time | peak memory |\n|---|---|---|---|---|---|")
    bare = least(found[INTERPRETER])
    for name, runs in found.items():
        times = f"{runs.wall:.2f} s | {least(runs):.2f} s | {least(runs) - bare:.2f} s | {runs.cpu:.2f} s"
        print(f"| `{name}` | {times} | {runs.peak:.0f} MiB |")
    write_json(arguments.json, {name: runs.as_json() for name, runs in found.items()})


if __name__ == "__main__":
    main()
