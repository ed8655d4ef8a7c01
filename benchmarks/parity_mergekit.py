"""Our methods against mergekit 0.1.5, numerically: the same tiny models through both whole pipelines.

    python benchmarks/parity_mergekit.py
    python benchmarks/parity_mergekit.py --json parity.json

mergekit runs in an environment of its own, benchmarks/out/mergekit-0.1.5, which the first run makes with pip; that
takes a package index, two minutes and 1.6 GB; later runs take half a minute and no network. Three tables: deterministic
methods position by position, methods that drop at random by statistics, and the intended differences, each of them
asserted. Every method has a case or a reason for having none.

Exit status: 0; 1 where a row misses its target, a difference is not as stated or a method has no case; 2 where nothing
could be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

from measuring import processor
from parity import chance, equality
from parity.bench import Bench
from parity.cases import CASES, NO_PEER
from parity.checking import Changed
from parity.differences import DIFFERENCES, GONE, Difference
from parity.environment import MERGEKIT, EnvironmentFailure, Peer, make_environment
from parity.models import make_models, shapes

from streammerge import METHODS, StreammergeError, __version__

WIDTH = 120
POSITIONS = sum(math.prod(shape) for shape in shapes().values())
ENVIRONMENT = Path(__file__).parent / "out" / f"mergekit-{MERGEKIT}"

DETERMINISTIC = f"""\
**Deterministic methods.** Models: near (task vectors of rms 0.002), far (0.05) or grid (near, rounded to the few values
bfloat16 has, so that magnitudes tie), and how many besides the base; all float32. Distances are the largest over all
{POSITIONS:,} positions of all tensors, in units in the last place (ulp) of float32 at the largest magnitude among the
models and both results at the position: where base and task vector cancel, the ulp of the result alone means nothing.
float64 is mergekit on float64 copies of the models. "Beyond" counts positions more than {equality.TARGET:.0f} ulp
apart, "ties" those left out because the tools may keep different ones of the entries at a threshold. equal: none
beyond. ours nearer: some, but ours at most {equality.ROUNDING:.0f} ulp from float64, and nearer to it than mergekit.
rounding: some, but both at most {equality.ROUNDING:.0f} ulp from float64; the order of operations."""
RANDOM = f"""\
**Methods that drop at random**, with mergekit's rescale (ours: `rescale: l1`), on a tensor of {chance.SHAPE[0]} x
{chance.SHAPE[1]}. Fractions kept, and differences in standard errors (z): of the fraction, the mean entry, the mean
|change| and, the largest of four, the fraction kept in a quarter of each row by magnitude. alike: no |z| above
{chance.LIMIT:.0f}."""
INTENDED = "**Intended differences**, each measured and asserted on both tools in this run."
EARLIER = "**Defects of mergekit 0.1.4** that 0.1.5 has no more, asserted likewise."


@dataclass(frozen=True)
class Found:
    """What the check of a difference gave."""

    difference: Difference
    measured: str
    holds: bool

    def as_json(self) -> dict[str, Any]:
        of = self.difference
        stated = {"method": of.method, "mergekit": of.theirs, "ours": of.ours}
        return {**stated, "measured": self.measured, "holds": self.holds}


@dataclass
class Results:
    """What a run found."""

    versions: dict[str, str]
    deterministic: list[equality.Row] = field(default_factory=list)
    random: list[chance.Row] = field(default_factory=list)
    intended: list[Found] = field(default_factory=list)
    earlier: list[Found] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        everything: Iterable[equality.Row | chance.Row | Found]
        everything = [*self.deterministic, *self.random, *self.intended, *self.earlier]
        return all(row.holds for row in everything) and not uncovered()

    def as_json(self) -> dict[str, Any]:
        tables: dict[str, Sequence[equality.Row | chance.Row | Found]]
        tables = {
            "deterministic": self.deterministic,
            "random": self.random,
            "intended": self.intended,
            "earlier": self.earlier,
        }
        rows = {name: [row.as_json() for row in table] for name, table in tables.items()}
        return {"versions": self.versions, **rows, "uncovered": uncovered(), "holds": self.holds}


def uncovered() -> list[str]:
    """Methods that have neither a case nor a reason for having none."""
    covered = {case.method for case in CASES} | set(chance.CASES) | set(NO_PEER)
    return [method for method in METHODS if method not in covered]


def compare_all(folder: Path, python: Path) -> Results:
    """Every comparison, in a scratch folder."""
    with Peer(python, folder / "mergekit.log") as peer:
        bench = Bench(folder, peer)
        states = {"near": make_models(0.002), "far": make_models(0.05)}
        states["grid"] = [{name: value.bfloat16().float() for name, value in state.items()} for state in states["near"]]
        sets = {name: bench.models(models) for name, models in states.items()}
        wide = {name: bench.models([*map(equality.as_float64, models)]) for name, models in states.items()}
        large = chance.large_models(bench)
        return Results(
            peer.versions,
            [equality.compare(bench, case, sets[case.models], wide[case.models]) for case in CASES],
            [chance.compare(bench, method, large.first(experts)) for method, experts in chance.CASES.items()],
            [check(bench, difference) for difference in DIFFERENCES],
            [check(bench, difference) for difference in GONE],
        )


def check(bench: Bench, difference: Difference) -> Found:
    try:
        return Found(difference, difference.check(bench), True)
    except Changed as changed:
        return Found(difference, f"NOT SO: {changed}", False)


def lines(results: Results) -> Iterator[str]:
    """The tables, in Markdown."""
    versions = [f"{name} {number}" for name, number in results.versions.items() if name != "mergekit"]
    yield f"mergekit {results.versions['mergekit']} ({', '.join(versions)})"
    yield f"streammerge {__version__} (python {platform.python_version()}, torch {version('torch')})"
    yield f"{processor()}, {os.cpu_count()} cores\n"
    yield fill(DETERMINISTIC, WIDTH) + "\n"
    yield "| method | case | models | apart | ulp | beyond | ties | ours to float64 | mergekit to float64 | |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in results.deterministic:
        yield (
            f"| `{row.method}` | {row.variant} | {row.models} | {row.absolute:.2g} | {row.apart:.3g} | {row.beyond} "
            f"| {row.excluded} | {row.ours_off:.3g} | {row.peer_off:.3g} | {row.verdict} |"
        )
    yield "\n" + fill(RANDOM, WIDTH) + "\n"
    yield "| method | models | kept | mergekit | z | z of mean | z of change | z by rank | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for draw in results.random:
        yield (
            f"| `{draw.method}` | {draw.models} | {draw.kept[0]:.4f} | {draw.kept[1]:.4f} | {draw.kept_z:+.1f} "
            f"| {draw.mean_z:+.1f} | {draw.change_z:+.1f} | {draw.rank_z:+.1f} | {draw.verdict} |"
        )
    for caption, table in ((INTENDED, results.intended), (EARLIER, results.earlier)):
        yield f"\n{caption}\n\n| method | mergekit | ours | measured |\n|---|---|---|---|"
        for found in table:
            of = found.difference
            yield f"| `{of.method}` | {of.theirs} | {of.ours} | {found.measured} |"
    yield "\n**No peer:** " + "; ".join(f"`{method}` ({why})" for method, why in NO_PEER.items() if method in METHODS)
    for method in uncovered():
        yield f"NO CASE: `{method}` has neither a case nor a reason for having none"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", help="of another environment that has mergekit")
    arguments = parser.parse_args(argv)
    try:
        python = arguments.peer_python or make_environment(ENVIRONMENT)
        with tempfile.TemporaryDirectory() as folder:
            results = compare_all(Path(folder), python)
    except (EnvironmentFailure, StreammergeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    return 0 if results.holds else 1


if __name__ == "__main__":
    sys.exit(main())
