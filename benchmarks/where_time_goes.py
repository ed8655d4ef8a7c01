"""Where the time of one merge goes: read, look, each pass, apply, write, hash, sync, wait; by thread and worker.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --method ties --base pair/base --ft pair/ft --threads 1

One merge by this process and its forks, with a clock wrapped around the calls that do the work; they stay as they are
in a merge without it. A phase's time is its own, without that of the phases it calls. Two numbers per thread or fork:
wall time, and the processor's time in it (user and system). What lies between them is waiting: for the disk, for a
processor that others have. "rest" is what no phase accounts for. The method's passes go by the names of their classes.
A Fisher, where one is needed, is measured before and not part of it.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from measuring import machine

from streammerge import METHODS, engine, fisher, make_recipe, plan, row_reader
from streammerge.checkpoints.shard_file import ShardFile
from streammerge.checkpoints.source import LocalFile
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.engine import Engine
from streammerge.jobs import Begin, Tell, in_forks
from streammerge.methods.api import Method, Pass
from streammerge.row_reader import RowReader
from streammerge.row_writer import RowWriter
from streammerge.unit_work import Merge, Survey
from streammerge.units import parse_size

Times = dict[str, list[float]]  # phase -> wall seconds, processor seconds, calls
_Any = TypeVar("_Any")


class Clock:
    """Wall and processor time per thread and phase.

    Attributes:
        threads: name of the thread, or of the fork -> its phases.
    """

    def __init__(self) -> None:
        self.threads: dict[str, Times] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0]))
        self._local = threading.local()

    def timed(self, function: Callable[..., _Any], phase: str) -> Callable[..., _Any]:
        """The function, its own time counted as that of the phase."""

        @wraps(function)
        def run(*arguments: Any, **named: Any) -> _Any:
            inner = self._local.__dict__.setdefault("inner", [[0.0, 0.0]])
            inner.append([0.0, 0.0])
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
                within = inner.pop()
                inner[-1][0] += wall
                inner[-1][1] += cpu
                entry = self.threads[threading.current_thread().name][phase]
                entry[0] += wall - within[0]
                entry[1] += cpu - within[1]
                entry[2] += 1

        return run

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def wrap_everything(self) -> None:
        """Of a merge; of this process, for good."""
        self.wrap(LocalFile, "read_into", "read")
        self.wrap(row_reader, "require_finite", "look for NaN and Inf")
        for step in _subclasses(Pass):
            if "update" in vars(step):
                self.wrap(step, "update", f"pass {step.__name__}")
        for method in _subclasses(Method):
            if "apply" in vars(method):
                self.wrap(method, "apply", "apply")
        self.wrap(RowWriter, "add", "convert")
        self.wrap(ShardFile, "__init__", "reserve")
        self.wrap(ShardFile, "write", "write")
        self.wrap(ShardFile, "_read", "read back")
        self.wrap(ShardFile, "hash_ahead", "hash")
        self.wrap(ShardFile, "flush", "sync")
        self.wrap(CheckpointWriter, "wait", "wait for the hash")
        self.wrap(Engine, "_work", "wait for the workers")
        self.wrap(RowReader, "__init__", "rest")
        self.wrap(Merge, "do", "rest")
        self.wrap(Survey, "do", "rest")
        self.wrap(RowReader, "load", "rest")
        vars(engine)["in_forks"] = partial(self.in_forks, in_forks)

    def in_forks(self, plain: Callable[..., None], count: int, jobs: int, begin: Begin, told: Tell, *rest: Any) -> None:
        """`jobs.in_forks`, whose forks tell their times too, behind each job."""
        names: dict[int, str] = {}

        def beginning(tell: Tell) -> Callable[[int], object]:
            self.threads.clear()
            do = begin(tell)

            def one(number: int) -> None:
                do(number)
                tell(_OfFork(os.getpid(), dict(self.threads[threading.current_thread().name])))

            return one

        def hear(message: Any) -> None:
            if isinstance(message, _OfFork):
                name = names.setdefault(message.pid, f"worker {len(names) + 1}")
                self.threads[name] = defaultdict(lambda: [0.0, 0.0, 0], message.times)
            else:
                told(message)

        plain(count, jobs, beginning, hear, *rest)


@dataclass(frozen=True)
class _OfFork:
    """The times of a fork so far."""

    pid: int
    times: Times


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def table(clock: Clock, wall: float, cpu: float) -> Iterator[str]:
    """The table, in Markdown."""
    threads = sorted(clock.threads)
    phases = sorted(
        {phase for times in clock.threads.values() for phase in times},
        key=lambda phase: -sum(times[phase][1] for times in clock.threads.values()),
    )
    yield "| phase | calls | " + " | ".join(threads) + " | all |"
    yield "|---|---|" + "---|" * (len(threads) + 1)
    for phase in phases:
        entries = [clock.threads[thread][phase] for thread in threads]
        total = [sum(column) for column in zip(*entries, strict=True)]
        cells = [f"{w:.2f} / {c:.2f}" if calls else "-" for w, c, calls in [*entries, total]]
        yield f"| {phase} | {total[2]:.0f} | {' | '.join(cells)} |"
    counted = sum(entry[1] for times in clock.threads.values() for entry in times.values())
    yield f"\n{wall:.2f} s of wall time, {cpu:.2f} s of processor time, {cpu - counted:.2f} s of it in none of these"


def measure(method: str, base: Path, experts: list[Path], out: Path, max_ram: int, threads: int | None) -> str:
    """Merge with a clock; the tables."""
    clock = Clock()
    clock.wrap_everything()
    recipe: dict[str, Any] = {"base": str(base), "models": [str(path) for path in experts], "method": method}
    with plan(make_recipe(recipe)) as planned:
        if planned.method.needs_fisher and not planned.method.fisher_of_experts:
            kept = out.with_name(f"{out.name}-fisher")
            if not (kept / "fisher.json").is_file():
                fisher(str(base), kept, device="cpu")
            recipe["fisher_from"] = [str(kept)]
    clock.threads.clear()
    with plan(make_recipe(recipe), max_ram=max_ram, threads=threads) as planned:
        writer = CheckpointWriter(out, planned.shards, {"profile": method}, fresh=True)
        with writer:
            start, before = time.perf_counter(), os.times()
            Engine(planned, writer, progress=False).run()
            wall, after = time.perf_counter() - start, os.times()
            writer.discard()
    cpu = sum(after[:4]) - sum(before[:4])
    return "\n".join(table(clock, wall, cpu))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    pair = Path("benchmarks/out/qwen2-1.5b-tied")
    add("--method", choices=METHODS, default="task_arithmetic", metavar="METHOD", help="(%(default)s)")
    add("--base", type=Path, default=pair / "base", help="(%(default)s, which merge_speed.py makes)")
    add("--ft", type=Path, action="append", help="repeat for several")
    add("--out", type=Path, default=Path("benchmarks/out/where"), help="for the merge, which is removed (%(default)s)")
    add("--max-ram", default="256MiB")
    add("--threads", type=int)
    arguments = parser.parse_args(argv)
    experts = arguments.ft or [pair / "ft"]
    budget = parse_size(arguments.max_ram)
    text = measure(arguments.method, arguments.base, experts, arguments.out, budget, arguments.threads)
    print(f"{arguments.method}; streammerge {version('streammerge')}, torch {version('torch')}")
    print(f"{machine()}, load {os.getloadavg()[1]:.1f}; seconds, wall / processor\n")
    print(text)


if __name__ == "__main__":
    main()
