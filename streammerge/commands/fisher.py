"""`streammerge fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

import streammerge
from streammerge.checkpoints.locate import HUB_SCHEME
from streammerge.commands.printing import show
from streammerge.fisher.store import FisherRecord, FisherSettings
from streammerge.options import (
    AsJson,
    Base,
    Device,
    DeviceMap,
    Hub,
    HubBase,
    MaxShard,
    MaxVram,
    NoDiskCheck,
    Out,
    Overwrite,
    Quiet,
    TrustRemoteCode,
    fisher_settings,
)
from streammerge.report import fisher_rows, table
from streammerge.schema import build_from_options
from streammerge.text import visible
from streammerge.units import parse_size


def fisher(
    base: Base = None,
    hub_base: HubBase = None,
    hub_mode: Hub = "cache",
    out: Out = None,
    device: Device = None,
    max_vram: MaxVram = None,
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_shard_size: MaxShard = None,
    no_disk_check: NoDiskCheck = False,
    overwrite: Overwrite = False,
    json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Measure the diagonal Fisher of a base model, for reuse by `merge --fisher`.

    Example: streammerge fisher --base Qwen/Qwen2.5-Math-7B --out fisher
    """
    model = HUB_SCHEME + hub_base if hub_base else base
    if model is None:
        raise typer.BadParameter("give the base model", param_hint="--base")
    if out is None:
        raise typer.BadParameter("give the output folder", param_hint="--out")
    record = streammerge.fisher(
        model,
        out,
        build_from_options(FisherSettings, fisher_settings(options)),
        hub_mode=hub_mode,
        device=device,
        max_vram=parse_size(max_vram, "--max-vram") if max_vram else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=parse_size(max_shard_size or "5GB", "--max-shard-size"),
        overwrite=overwrite,
        check_disk=not no_disk_check,
        progress=not quiet,
    )
    show(record.model_dump() if json else _fisher_text(record, out), f"the Fisher in {out} is complete")


def _fisher_text(record: FisherRecord, out: Path) -> str:
    ratio = f"{record.ratio:.1f}" if record.ratio else "undefined"
    lines = [table(*fisher_rows(record)), "", f"largest over smallest block mean: {ratio}"]
    lines += [f"note: {visible(note)}" for note in record.notes]
    return "\n".join([*lines, f"Fisher of {visible(record.base.id)} in {visible(str(out))}"])
