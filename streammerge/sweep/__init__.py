"""Merge a grid of recipes with one Fisher, score each, and say which are worth having."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge.budget import DEFAULT_MAX_RAM
from streammerge.fisher.placement import FisherRun
from streammerge.hub.pull import HubMode
from streammerge.recipe import RecipeLike
from streammerge.sweep.evaluations import find_evaluation
from streammerge.sweep.grid import Grid
from streammerge.sweep.run import Job, Run


def sweep(
    recipe: RecipeLike,
    grid: Grid,
    out: str | Path,
    *,
    evaluation: str = "mini_l2s",
    limit: int | None = None,
    one_by_one: bool = False,
    keep_merged: bool = False,
    max_ram: int | str = DEFAULT_MAX_RAM,
    threads: int | None = None,
    hub_mode: HubMode = "cache",
    device: str | None = None,
    max_vram: int | None = None,
    device_map: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Merge every point of a grid, score it, and find the Pareto front of accuracy and mean length.

    All points are checked before anything is measured. The Fisher is measured once, into `out/fisher`, and used by
    every point that needs one. Interrupted, the same call goes on: no finished point and no Fisher is done again. A
    call with another grid goes on too, and does what is new.

    Args:
        recipe: the merge that all points start from; see `merge`.
        grid: key of the recipe (method, aim, ...) or parameter of its method -> values; also calibration.samples and
            the like. A value for all models, or a list with one each.
        out: folder of the sweep; new, empty, or of the same sweep.
        evaluation: a key of `streammerge.sweep.evaluations.EVALUATIONS`.
        limit: problems to score by; all of them by default.
        one_by_one: the recipe as it is, and each key varied alone, as in an ablation; else every combination.
        keep_merged: keep the merged models, in `out/points`; else a model is removed once it is scored, and its
            manifest stays.
        max_ram, threads, hub_mode, device, max_vram, device_map, trust_remote_code: see `merge`.
        progress: show what is done on standard error.

    Returns:
        {"version", "evaluation", "limit", "grid", "sources", "points": one of {"point": its name, "settings", "scores":
        what the evaluation gave, "front": whether it is on the front} each, "notes"}; also in `out/sweep.json`, and
        as a table in `out/sweep.md`, with a picture where matplotlib is installed.

    Raises:
        RecipeError: a key, a value or an evaluation that there is not, with the point's settings.
        OutputExistsError: `out` holds something else, or a sweep of another recipe, base or evaluation.
        StreammergeError: whatever a merge raises.
    """
    job = Job(recipe, grid, Path(out), find_evaluation(evaluation), evaluation.replace("-", "_"), limit, one_by_one)
    fisher_run = FisherRun(device, max_vram, device_map, trust_remote_code)
    return Run(job, fisher_run, max_ram, threads, hub_mode, keep_merged, progress).run()
