"""Time and peak memory of a merge against the number of parameters, and against the number of experts.

    python benchmarks/scaling.py                                       # 0.1B to 1.5B; 1 to 8 experts of the 0.5B shape
    python benchmarks/scaling.py --largest qwen2-7b --plot scaling.svg # and the 7B shape: 46 GB of disk for a while

Synthetic checkpoints of real shapes are made size by size, merged by every method, and removed again. Each merge is a
process of its own, from its start to its end; time and memory are of all of it, the import of torch included: the
median time and the most memory of --runs, made in turn. "raw" reads the same checkpoints and writes one by two threads,
with nothing done to them (`raw_copy.py`). A size that does not fit the disk is left out, and a line says so. Read with
care: of what does not fit the page cache (inputs and output together) the time is the disk's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import cycle, groupby
from math import prod
from pathlib import Path
from typing import Any

from make_checkpoints import SHAPES, Shape, make_pair
from measuring import CommandFailed, in_turn, machine, merging, write_json
from merge_speed import OURS, RAW

from streammerge import METHODS

SIZES = {"0.1b": Shape(512, 2816, 12, 8, 2, 65536, True), **SHAPES}
FLOOR = "raw"


@dataclass(frozen=True)
class Point:
    """One merge of the plots."""

    method: str
    parameters: int
    experts: int
    wall: float
    cpu: float
    peak: float


def parameters(shape: str) -> int:
    """Of a base of this shape."""
    found = SIZES[shape]
    return sum(prod(size) for _, size in found.tensors(found.tie_word_embeddings))


def fits(shape: str, experts: int, folder: Path) -> bool:
    """Whether a base, the experts and a merge of this shape fit the disk, in bfloat16."""
    return 2 * parameters(shape) * (experts + 2) * 1.02 < shutil.disk_usage(folder).free


def merged(folder: Path, shape: str, experts: Sequence[int], methods: Sequence[str], runs: int) -> Iterator[Point]:
    """Make the checkpoints, merge them by every method with each number of experts, remove them."""
    models, out = folder / f"scaling-{shape}", folder / "scaling-out"
    shutil.rmtree(models, ignore_errors=True)
    try:
        base, *tuned = make_pair(SIZES[shape], models, experts=max(experts), say=lambda line: None)
        commands: dict[tuple[str, int], list[str]] = {}
        for count in experts:
            read = [word for model in (base, *tuned[:count]) for word in ("--read", str(model))]
            commands[FLOOR, count] = [*RAW, *read, "--write", str(out)]
            named = ["--base", str(base), *(word for model in tuned[:count] for word in ("--ft", str(model)))]
            for method in methods:
                commands[method, count] = [*OURS, "merge", *named, "-m", method, "-o", str(out), "-q", "--no-report"]
        contenders = {
            f"{method}, {count}": merging(command, [base, *tuned], out, several=method != FLOOR)
            for (method, count), command in commands.items()
        }
        say = lambda line: print(f"{shape}: {line}", file=sys.stderr, flush=True)  # noqa: E731
        found = in_turn(contenders, runs, 600, say)
        for (method, count), name in zip(commands, contenders, strict=True):
            of = found[name]
            yield Point(method, parameters(shape), count, of.wall, of.cpu, of.peak)
    finally:
        shutil.rmtree(models, ignore_errors=True)


def table(points: Sequence[Point], by: str) -> Iterator[str]:
    """One table, in Markdown; `by`: what grows, "parameters" or "experts"."""
    yield f"| method | {by} | wall time | per GB read | to raw | processor | peak memory |"
    yield "|---|---|---|---|---|---|---|"
    raw = {(point.parameters, point.experts): point for point in points if point.method == FLOOR}
    for point in sorted(points, key=lambda p: (p.method == FLOOR, p.method, p.parameters, p.experts)):
        grows = f"{point.parameters / 1e9:.2f}B" if by == "parameters" else str(point.experts)
        read = 2e-9 * point.parameters * (point.experts + 1)
        ratio = point.wall / raw[point.parameters, point.experts].wall
        yield (
            f"| {point.method} | {grows} | {point.wall:.1f} s | {point.wall / read:.2f} s | {ratio:.2f} "
            f"| {point.cpu:.1f} s | {point.peak:.0f} MiB |"
        )


def plot(sizes: Sequence[Point], numbers: Sequence[Point], path: Path) -> None:
    """Time and memory against both, in one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    methods = sorted({point.method for point in (*sizes, *numbers)})
    styles = {method: f"{mark}-C{i}" for i, (method, mark) in enumerate(zip(methods, cycle("os^Dv"), strict=False))}
    for column, (points, by) in enumerate(((sizes, "parameters"), (numbers, "experts"))):
        of_methods = sorted(points, key=lambda point: (point.method, getattr(point, by)))
        for method, group in groupby(of_methods, key=lambda point: point.method):
            line = list(group)
            grows = [getattr(point, by) / (1e9 if by == "parameters" else 1) for point in line]
            axes[0][column].plot(grows, [point.wall for point in line], styles[method], label=method)
            axes[1][column].plot(grows, [point.peak for point in line], styles[method])
        axes[0][column].set(ylabel="wall time, s", ylim=(0, 1.05 * max(point.wall for point in points)))
        axes[1][column].set(ylabel="peak memory, MiB", ylim=(0, 1.05 * max(point.peak for point in points)))
        axes[1][column].set_xlabel("parameters, billions" if by == "parameters" else "fine-tuned models")
        axes[0][column].legend(frameon=False)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status: 0, or 2 where something could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--largest", choices=SIZES, default="qwen2-1.5b", metavar="SHAPE", help="of %(choices)s (%(default)s)")
    add("--smallest", choices=SIZES, default="0.1b", metavar="SHAPE", help="(%(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=["task_arithmetic", "ties"], metavar="METHOD")
    add("--experts", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="(%(default)s)")
    add("--experts-shape", choices=SIZES, default="qwen2-0.5b", metavar="SHAPE", help="(%(default)s)")
    add("--runs", type=int, default=3, help="rounds (%(default)s)")
    add("--out", type=Path, default=Path("benchmarks/out"), help="folder for checkpoints and merges")
    add("--plot", type=Path, metavar="FILE", help="draw both tables into this file; needs matplotlib")
    add("--json", type=Path, metavar="FILE", help="also write every point as JSON")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rising = sorted(SIZES, key=parameters)
    wanted = rising[rising.index(arguments.smallest) : rising.index(arguments.largest) + 1]
    found: dict[str, list[Point]] = {"parameters": [], "experts": []}
    jobs: list[tuple[str, str, list[int]]] = [("parameters", shape, [1]) for shape in wanted]
    if arguments.experts:
        jobs.append(("experts", arguments.experts_shape, sorted(arguments.experts)))
    left_out = []
    try:
        for by, shape, experts in jobs:
            if fits(shape, max(experts), arguments.out):
                found[by] += merged(arguments.out, shape, experts, arguments.methods, arguments.runs)
            else:
                left_out.append(f"{shape} with {max(experts)} fine-tuned model(s): the disk is too small")
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"streammerge {version('streammerge')}, torch {version('torch')}\n{machine()}, {arguments.runs} runs\n")
    for by, points in found.items():
        print("\n".join(table(points, by)) + "\n")
    print("\n".join(left_out))
    as_json: dict[str, Any] = {by: [asdict(point) for point in points] for by, points in found.items()}
    write_json(arguments.json, {**as_json, "left_out": left_out})
    if arguments.plot:
        plot(found["parameters"], found["experts"], arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
