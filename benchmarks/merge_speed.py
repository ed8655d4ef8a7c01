"""The pace of whole merges: ours, mergekit 0.1.5, and the floors of the machine, in one interleaved run.

    python benchmarks/merge_speed.py
    python benchmarks/merge_speed.py --only task_arithmetic ties --runs 5 --json speed.json

Makes a synthetic base and two fine-tunes of a real shape, all with tied embeddings, so that both tools read and write
the same tensors; every method merges the base and one of them (model_stock: two) with the same parameters in both
tools, each run a process of its own, from its start to its end. mergekit gets `dtype: bfloat16`, as in its own
examples, in which it is fastest (ours computes in float32), and runs in an environment of its own, which the first run
makes with pip. What is slower than --slow seconds runs once.

Runs are made in turn (A B A B), after the inputs were read into the page cache and nothing was left to be written.
Times are medians; ratios are medians of the ratios within a round; memory is the most of all runs, of the whole
process by the kernel's account, the imports included. The floors: `cat base > /dev/null; cp -r ft out`, and
`raw_copy.py`, which reads the two and writes one by two threads, left to the system to write out or, as a merge does,
synced to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from make_checkpoints import SHAPES, make_pair
from measuring import CommandFailed, Runs, Usage, in_turn, machine, merging, write_json
from parity.environment import MERGEKIT, EnvironmentFailure, make_environment

OURS = [sys.executable, "-m", "streammerge"]
RAW = [sys.executable, str(Path(__file__).with_name("raw_copy.py"))]
FLOORS = ("cat + cp", "raw", "raw, synced")


@dataclass(frozen=True)
class Case:
    """A method with the same parameters in both tools.

    Attributes:
        ours: options of the command line.
        theirs: mergekit's parameters; None: it has no such method.
        each: mergekit's parameters of every model.
        base_is_model: whether mergekit takes the base as one of the models.
        experts: fine-tuned models.
    """

    ours: Mapping[str, float | str] = field(default_factory=dict)
    theirs: Mapping[str, Any] | None = field(default_factory=dict)
    each: Mapping[str, float] = field(default_factory=dict)
    base_is_model: bool = False
    experts: int = 1


CASES: Mapping[str, Case] = {
    "linear": Case({"coefficient": 1}, {}, {"weight": 1.0}, base_is_model=True),
    "task_arithmetic": Case({"coefficient": 0.7}, {}, {"weight": 0.7}),
    "ties": Case({"coefficient": 1, "density": 0.2}, {}, {"weight": 1.0, "density": 0.2}),
    "dare_ties": Case({"coefficient": 1, "density": 0.7, "rescale": "l1"}, {}, {"weight": 1.0, "density": 0.7}),
    "slerp": Case({"t": 0.5}, {"t": 0.5}, base_is_model=True),
    "karcher": Case({"max_iter": 10, "tol": 1e-5}, {"max_iter": 10, "tol": 1e-5}, base_is_model=True),
    "model_stock": Case(experts=2),
    "fim_ties": Case({"device": "cpu"}, theirs=None),
}
BASE_NAMED = {"slerp"}  # where mergekit wants to know which of the models is the base


class Bench:
    """The checkpoints, and a place for what is made of them."""

    def __init__(self, folder: Path, out: Path, peer: Path | None) -> None:
        self.base = folder / "base"
        self.experts = [folder / "ft", folder / "ft2"]
        self.out, self.peer = out, peer

    def contenders(self, methods: list[str]) -> dict[str, Callable[[], Usage]]:
        """All that runs in a round, in order."""
        found: dict[str, Callable[[], Usage]] = {}
        for name, command in zip(FLOORS, self._floors(), strict=True):
            found[name] = self._runs(command)
        for method in methods:
            case = CASES[method]
            found[f"{method}, ours"] = self._runs(self._ours(method, case), several=True)
            if self.peer is not None and case.theirs is not None:
                found[f"{method}, mergekit"] = self._runs(self._theirs(method, case, self.peer))
        return found

    def _runs(self, command: list[str], several: bool = False) -> Callable[[], Usage]:
        return merging(command, [self.base, *self.experts], self.out, several)

    def _floors(self) -> Iterator[list[str]]:
        base, ft, out = self.base, self.experts[0], self.out
        yield ["sh", "-c", 'cat "$0"/*.safetensors > /dev/null; cp -r "$1" "$2"', str(base), str(ft), str(out)]
        raw = [*RAW, "--read", str(base), "--read", str(ft), "--write", str(out)]
        yield raw
        yield [*raw, "--durable"]

    def _ours(self, method: str, case: Case) -> list[str]:
        models = [word for model in self.experts[: case.experts] for word in ("--ft", str(model))]
        options = [word for key, value in case.ours.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return [
            *OURS,
            "merge",
            "--base",
            str(self.base),
            *models,
            "-m",
            method,
            *options,
            "-o",
            str(self.out),
            "-q",
            "--no-report",
        ]

    def _theirs(self, method: str, case: Case, python: Path) -> list[str]:
        models = [*([self.base] if case.base_is_model else []), *self.experts[: case.experts]]
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(model), "parameters": dict(case.each)} for model in models],
            "parameters": dict(case.theirs or {}),
            "dtype": "bfloat16",
        }
        if not case.base_is_model or method in BASE_NAMED:
            config["base_model"] = str(self.base)
        recipe = self.out.with_name(f"{method}.yaml")
        recipe.write_text(json.dumps(config))  # which is YAML too
        return [str(python.with_name("mergekit-yaml")), str(recipe), str(self.out), "--quiet", "--no-copy-tokenizer"]


def table(found: Mapping[str, Runs], methods: list[str]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| | runs | wall time | processor | peak memory | to cat + cp | to raw | to raw, synced |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, runs in found.items():
        ratios = " | ".join(f"{runs.over(found[floor]):.2f}" for floor in FLOORS)
        yield f"| {name} | {len(runs.usages)} | {runs.walls} | {runs.cpu:.1f} s | {runs.peak:.0f} MiB | {ratios} |"
    yield "\n| method | ours | mergekit | faster | processor time | memory |"
    yield "|---|---|---|---|---|---|"
    for method in methods:
        ours, theirs = found[f"{method}, ours"], found.get(f"{method}, mergekit")
        if theirs is None:
            yield f"| `{method}` | {ours.wall:.1f} s, {ours.peak:.0f} MiB | - | - | - | - |"
        else:
            yield (
                f"| `{method}` | {ours.wall:.1f} s, {ours.peak:.0f} MiB | {theirs.wall:.1f} s, {theirs.peak:.0f} MiB "
                f"| {theirs.over(ours):.1f}x | 1/{theirs.cpu / ours.cpu:.1f} | 1/{theirs.peak / ours.peak:.1f} |"
            )


def versions(peer: Path | None) -> str:
    """Ours and the peer's."""
    mine = f"streammerge {version('streammerge')}, python {sys.version.split()[0]}, torch {version('torch')}"
    if peer is None:
        return f"{mine}; no mergekit"
    code = "from importlib.metadata import version as v; print(f\"mergekit {v('mergekit')}, torch {v('torch')}\")"
    return f"{mine}; {subprocess.run([str(peer), '-c', code], capture_output=True, text=True).stdout.strip()}"


def make_models(shape: str, folder: Path) -> None:
    """A base and two fine-tunes, all tied as the shape is, where they are not there yet."""
    if not (folder / "ft2" / "config.json").is_file():
        make_pair(shape, folder, experts=2, say=lambda line: print(line, file=sys.stderr, flush=True))


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status: 0, or 2 where something could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="qwen2-1.5b", help="the models' (%(default)s)")
    add("--out", type=Path, default=Path("benchmarks/out"), help="folder for models, merges and mergekit")
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD", help="of %(choices)s")
    add("--runs", type=int, default=3, help="rounds (%(default)s)")
    add("--slow", type=float, default=120.0, metavar="SECONDS", help="what takes longer runs once (%(default)s)")
    add("--no-peer", action="store_true", help="without mergekit")
    add("--peer-python", type=Path, metavar="PYTHON", help="of another environment that has mergekit")
    add("--json", type=Path, metavar="FILE", help="also write every run as JSON")
    arguments = parser.parse_args(argv)
    folder = arguments.out / f"{arguments.shape}-tied"
    try:
        peer = None
        if not arguments.no_peer:
            peer = arguments.peer_python or make_environment(arguments.out / f"mergekit-{MERGEKIT}")
        make_models(arguments.shape, folder)
        bench = Bench(folder, arguments.out / "speed", peer)
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        found = in_turn(bench.contenders(arguments.only), arguments.runs, arguments.slow, say)
    except (EnvironmentFailure, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.shape}; {versions(peer)}\n{machine()}, load {os.getloadavg()[1]:.1f}\n")
    print("\n".join(table(found, arguments.only)))
    write_json(arguments.json, {name: runs.as_json() for name, runs in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
