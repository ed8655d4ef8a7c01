"""The mini long-to-short pair merged by several methods, and what each merge scores. Offline, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge import mini_l2s
from streammerge.checkpoints.output import check_output
from streammerge.errors import OutputExistsError, TransferError
from streammerge.fisher import fisher
from streammerge.merge import merge
from streammerge.report import block_rows, table
from streammerge.sweep.text import pareto_front

MARKER = ".streammerge-demo"
METHODS = ("linear", "task_arithmetic", "ties", "karcher", "fim_ta", "fim_ties")
OURS = "fim_ties"
COLUMNS = """\
alpha: how much of the long model's change goes into the block; the higher the score, the less
score: logarithm of Fisher mean times mean square of the change
Fisher mean: how much the base's loss depends on the block's weights; kept: share of the change left after trimming"""


def run(
    out: Path, *, methods: Sequence[str] = METHODS, limit: int | None = None, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Merge the mini pair by every method, each with its defaults, into a folder of `out`, and print what they score.

    One Fisher, in `out/fisher`, serves the methods that need one. An earlier demo in `out` is replaced, file by file;
    anything else there is left alone.

    Args:
        out: a folder that is new, empty, or of an earlier demo.
        methods: names of merge methods; the table of decoder blocks is that of fim_ties, if it is among them.
        limit: how many held-out problems; see `mini_l2s.score`.
        progress: show progress bars on standard error.

    Returns:
        Of the base, the long model and every merge, what `mini_l2s.score` returned.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    started = time.perf_counter()
    _claim(out, methods)
    base, long = mini_l2s.pair()
    print("A pair of models comes with the package: the base answers word problems tersely, the long model was tuned")
    print("on from it to think aloud, and to check every step. Held-out problems, answered by both and their merges:\n")
    fisher(str(base), out / "fisher", device="cpu", overwrite=True, progress=progress)
    folders, blocks = {"base": base, "long": long}, None
    for method in methods:
        folders[method] = out / method
        recipe: dict[str, Any] = {"base": str(base), "models": [str(long)], "method": method}
        if method.startswith("fim_"):
            recipe["fisher_from"] = [str(out / "fisher")]
        result = merge(recipe, folders[method], device="cpu", overwrite=True, report=method == OURS, progress=progress)
        blocks = result if method == OURS else blocks
    scores = {name: mini_l2s.score(folder, limit=limit, progress=progress) for name, folder in folders.items()}
    print(table(*score_rows(scores)), end="\n\n")
    if blocks is not None:
        print("\n".join(verdict(scores)), end="\n\n")
        print(f"What {OURS} did, decoder block by decoder block:\n\n{table(*block_rows(blocks))}\n\n{COLUMNS}\n")
    print(f"{time.perf_counter() - started:.0f} seconds. The merges and the Fisher are in {out}.")
    print(f"The pair is in {base.parent}.")
    return scores


def score_rows(scores: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores; the length also as a share of the long model's."""
    whole = scores["long"]["mean_length"]
    rows = []
    for name, score in scores.items():
        length = score["mean_length"]
        share = f"{length / whole:.0%}" if whole else "-"
        rows.append([name, f"{score['accuracy']:.1%}", f"{length:.1f}", share, f"{score['seconds']:.1f}"])
    return ["model", "accuracy", "mean length", "of long", "seconds"], rows


def verdict(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the scores say of FIM-TIES, for good or ill, and which merge to take."""
    long = scores["long"]
    merges = {name: score for name, score in scores.items() if name not in ("base", "long")}
    error = 0.5 / long["problems"] ** 0.5
    told = [f"{OURS} {_beside(merges[OURS], long)}."]
    if long["accuracy"] - merges[OURS]["accuracy"] > 2 * error:
        told.append("It does not keep the accuracy here.")
    best = max(score["accuracy"] for score in merges.values())
    good = [name for name, score in merges.items() if score["accuracy"] >= best - 2 * error]
    shortest = min(good, key=lambda name: merges[name]["mean_length"])
    told.append(
        f"Of the most accurate merges, within {200 * error:.1f} points, {shortest} is the shortest: "
        f"{_beside(merges[shortest], long)}."
    )
    front = pareto_front([(score["accuracy"], score["mean_length"]) for score in merges.values()])
    names = ", ".join(name for name, first in zip(merges, front, strict=True) if first)
    told.append(f"No other merge is at least as accurate and no longer than each of these: {names}.")
    told.append(
        f"With {long['problems']} problems, the standard error of an accuracy is at most {100 * error:.1f} points."
    )
    return told


def _beside(score: Mapping[str, Any], long: Mapping[str, Any]) -> str:
    points = 100 * (score["accuracy"] - long["accuracy"])
    length = 100 * (score["mean_length"] / long["mean_length"] - 1) if long["mean_length"] else 0.0
    return f"beside the long model: accuracy {points:+.1f} points, length {length:+.0f}%"


def _claim(out: Path, methods: Sequence[str]) -> None:
    """Mark `out` as the demo's; refuse it where it, or a merge's folder in it, holds something else."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"output {out} is a file: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / MARKER).exists():
            raise OutputExistsError(f"output folder {out} holds no earlier demo, but other files: choose another --out")
        for method in methods:
            check_output(out / method, [], overwrite=True)
        (out / MARKER).touch()
    except OSError as error:
        raise TransferError(f"{out}: cannot be written: {error.strerror}") from error
