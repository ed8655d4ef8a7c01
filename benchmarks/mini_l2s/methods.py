"""Every merge method on mini long-to-short pairs, scored on held-out problems.

    python benchmarks/mini_l2s/train.py --seed 1 --out pairs/1        # and 2, 3
    python benchmarks/mini_l2s/methods.py pairs/1 pairs/2 pairs/3 --json methods.json

Prints a Markdown table: mean and standard deviation over the pairs of accuracy and mean length. Methods run at their
defaults; the variants are those of the papers. What needs a text gets training problems, answered in the style of each
model. Scores that the JSON file holds already are not made again: interrupted, the same call goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import streammerge
from streammerge import mini_l2s
from streammerge.mini_l2s.problems import BASE, LONG, Style, problems, response

Scores = dict[str, dict[str, dict[str, Any]]]
"""By case, then by the name of the pair."""

NOT_RUN = {
    "model_stock": "it takes the angle between two fine-tuned models; the pair has one",
    "passthrough": "it merges nothing: it is the base, or the long model",
}
READ_OWN_TEXT = ("sens", "regmean")  # of every model
READ_TEXT = ("acm_ta", "acm_ties", *READ_OWN_TEXT)
TEXT_PROBLEMS = 200


@dataclass(frozen=True)
class Case:
    """One merge: a method, parameters of the merge and of the long model, and other keys of the recipe."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    long: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = {**self.parameters, **self.long, **self.recipe}
        return " ".join([self.method, *(f"{name}={_shown(value)}" for name, value in options.items())])


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def cases() -> Iterator[Case]:
    """Every method at its defaults, then the variants that papers compare."""
    yield from (Case(method) for method in streammerge.METHODS if method not in NOT_RUN)
    yield from _fim_cases()
    yield from _spherical_cases()
    for coefficient in (0.3, 0.4, 0.5, 0.6, 0.8, 0.9):
        yield Case("task_arithmetic", long={"coefficient": coefficient})
    for density in (0.4, 0.7):
        yield Case("ties", long={"density": density})
    for method in ("task_arithmetic", "ties"):
        yield Case(method, recipe={"aim": 0.4})


def _fim_cases() -> Iterator[Case]:
    """The ablations of FIM-Merging, section 5.5: what the score is of, theta, what is kept, gates, norms."""
    for importance in ("fim", "norm"):
        yield Case("fim_ties", {"importance": importance})
    for theta in (0.1, 0.2, 0.3):
        yield Case("fim_ties", {"theta": theta})
    for density in (0.1, 0.4, 0.7):
        yield Case("fim_ties", long={"density": density})
    yield Case("fim_ties", {"trim": "magnitude"})
    yield Case("fim_ties", {"gate_factor": 1.0})
    yield Case("fim_ties", {"norm_tolerance": "off"})
    for method in ("fim_ta", "fim_ties"):
        yield Case(method, {"other": "mean"})
    yield Case("fim_ta", {"importance": "norm"})
    yield Case("fim_ta", {"theta": 0.3})


def _spherical_cases() -> Iterator[Case]:
    """The Karcher family and its baseline, the average with the mean norm; slerp and its kin."""
    yield Case("linear", {"norm_rescale": True})
    yield Case("karcher", {"max_iter": 0})
    yield Case("karcher", {"granularity": "block"})
    yield Case("karcher", {"precondition": True})
    yield Case("karcher", {"granularity": "block", "precondition": True})
    yield Case("karcher", long={"coefficient": 2.0})
    yield Case("slerp", {"t": 0.7})
    yield Case("nuslerp", {"nuslerp_flatten": False})


def write_text(path: Path, style: Style) -> str:
    """Training problems answered in one style, as the calibration text of a model."""
    draw = Random(0)
    asked = islice(problems("train", 0), TEXT_PROBLEMS)
    path.write_text("\n".join(f"{problem.question} {response(problem, style, draw)}" for problem in asked))
    return str(path)


def score_case(case: Case, pair: Path, folder: Path) -> dict[str, Any]:
    """Merge one pair into the folder, and score the result."""
    recipe = {
        "base": str(pair / "base"),
        "models": [{"model": str(pair / "long"), "parameters": dict(case.long)}],
        "method": case.method,
        "parameters": dict(case.parameters),
        **case.recipe,
    }
    if case.method in READ_TEXT or "aim" in case.recipe:
        texts = [write_text(folder / "base.txt", BASE), write_text(folder / "long.txt", LONG)]
        recipe["calibration"] = {"text": texts if case.method in READ_OWN_TEXT else texts[1:]}
    streammerge.merge(recipe, folder / "merged", device="cpu")
    return mini_l2s.score(folder / "merged", progress=False)


def score_all(pairs: Sequence[Path], path: Path | None) -> Scores:
    """Every case on every pair, the pairs' own models too; written after each score where there is a path."""
    scores: Scores = json.loads(path.read_text()) if path is not None and path.exists() else {}
    planned: list[Case | str] = ["base", "long", *cases()]
    for number, case in enumerate(planned):
        name = case if isinstance(case, str) else case.name
        for pair in pairs:
            if pair.name in scores.setdefault(name, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = (
                    mini_l2s.score(pair / case, progress=False)
                    if isinstance(case, str)
                    else score_case(case, pair, Path(folder))
                )
            scores[name][pair.name] = found
            if path is not None:
                path.write_text(json.dumps(scores, indent=2) + "\n")
        shown = " ".join(
            f"{scores[name][p.name]['accuracy']:.3f}/{scores[name][p.name]['mean_length']:.0f}" for p in pairs
        )
        print(f"{number + 1}/{len(planned)} {name}: {shown}", file=sys.stderr, flush=True)
    return scores


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation of a sample (n - 1); the mean alone of one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(scores: Scores) -> str:
    """A row per case, in the order in which they were scored."""
    lines = ["| merge | accuracy, % | mean length, tokens | truncated, % |", "|---|---|---|---|"]
    for name, by_pair in scores.items():
        found = list(by_pair.values())
        cells = [
            f"`{name}`",
            mean_and_deviation([100 * score["accuracy"] for score in found], 1),
            mean_and_deviation([score["mean_length"] for score in found], 1),
            mean_and_deviation([100 * score["truncated"] for score in found], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", type=Path, help="folders of train.py, one per seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every score as JSON, and go on from it")
    arguments = parser.parse_args(argv)
    scores = score_all(arguments.pairs, arguments.json)
    print(table(scores))
    for method, reason in NOT_RUN.items():
        print(f"\n`{method}` was not run: {reason}.")


if __name__ == "__main__":
    main()
