"""`streammerge verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.errors import CheckpointError
from streammerge.options import AsJson, Base, FisherFrom, Ft, Hub, MaxRam, Quiet, Sample, SampleSeed, Sources, Threads
from streammerge.report import verified_text
from streammerge.text import all_visible, visible
from streammerge.units import parse_size


def verify(
    folder: Annotated[Path, typer.Argument(help="The output folder of a merge.")],
    sources: Sources = False,
    sample: Sample = None,
    sample_seed: SampleSeed = None,
    base: Base = None,
    ft: Ft = None,
    fisher: FisherFrom = None,
    hub_mode: Hub = "cache",
    max_ram: MaxRam = "256MiB",
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a finished merge: every byte, header and value against its manifest, and tensors against their sources.

    Example: streammerge verify merged --sources --sample all
    """
    values: dict[str, Any] = {"sample": sample, "seed": sample_seed, "base": base, "models": ft, "fisher": fisher}
    given = {key: value for key, value in values.items() if value not in (None, [])}
    if given and not sources:
        raise typer.BadParameter(f"--{next(iter(given)).replace('models', 'ft')} goes with it", param_hint="--sources")
    given |= {"hub_mode": hub_mode, "max_ram": parse_size(max_ram, "--max-ram"), "threads": threads}
    try:
        result = streammerge.verify(folder, sources=given if sources else None, progress=not quiet)
    except CheckpointError as error:
        if not json:
            raise
        result = {"ok": False, "problems": [str(error)]}
    show(result if json else verified_text(all_visible(result), visible(str(folder))))
    if not result["ok"]:
        raise typer.Exit(1)
