"""`streammerge sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.options import AsJson, Device, DeviceMap, Hub, MaxRam, MaxVram, Quiet, Threads, TrustRemoteCode
from streammerge.recipe import load_recipe
from streammerge.sweep.evaluations import EVALUATIONS, mini_pair
from streammerge.sweep.grid import parse_grid
from streammerge.sweep.text import sweep_text
from streammerge.text import all_visible, visible
from streammerge.units import parse_size

MINI = "mini_l2s"


def sweep(
    recipe: Annotated[str, typer.Argument(help="YAML recipe that all start from; mini_l2s: the package's own pair.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep: new, empty, or of the same sweep.")],
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE,...",
            help="Key of the recipe or parameter of the method, and its values. Repeat for all combinations.",
        ),
    ],
    evaluation: Annotated[
        str, typer.Option("--eval", help=f"What the merged models are scored by: {', '.join(EVALUATIONS)}.")
    ] = MINI,
    limit: Annotated[int | None, typer.Option(min=1, help="Score by the first N problems only.")] = None,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="The recipe as it is, and each key varied alone: an ablation.")
    ] = False,
    keep_merged: Annotated[
        bool, typer.Option("--keep-merged", help="Keep the merged models; else each goes once it is scored.")
    ] = False,
    hub_mode: Hub = "cache",
    device: Device = None,
    max_vram: MaxVram = None,
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_ram: MaxRam = "256MiB",
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge a grid of recipes with one Fisher, score each, and print the Pareto front of accuracy and length.

    Interrupted, the same command goes on: no finished point and no Fisher is done again. See docs/sweep.md.

    Example: streammerge sweep recipe.yaml --set density=0.1,0.2 --set importance=fim,norm --out sweep
    """
    grid = parse_grid(set_)
    own_pair = recipe.replace("-", "_") == MINI and not Path(recipe).exists()
    values: dict[str, Any] = mini_pair() if own_pair else load_recipe(recipe)
    result = streammerge.sweep(
        values,
        grid,
        out,
        evaluation=evaluation,
        limit=limit,
        one_by_one=one_by_one,
        keep_merged=keep_merged,
        max_ram=parse_size(max_ram),
        threads=threads,
        hub_mode=hub_mode,
        device=device,
        max_vram=parse_size(max_vram) if max_vram else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    where = f"all of it in {visible(str(out))}: sweep.md, sweep.json"
    show(result if json else f"{sweep_text(all_visible(result))}\n{where}", f"the sweep is complete, {where}")
