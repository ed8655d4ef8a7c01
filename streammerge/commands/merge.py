"""`streammerge merge` and `streammerge plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

import streammerge
from streammerge.checkpoints.disk_space import rooms
from streammerge.checkpoints.locate import HUB_SCHEME
from streammerge.checkpoints.output import WORK_DIR, check_output
from streammerge.commands.printing import show
from streammerge.commands.push import pushed_text
from streammerge.errors import RecipeError
from streammerge.fisher.placement import FisherRun
from streammerge.host import available_memory, memory_limits
from streammerge.hub.publication import make_publication
from streammerge.needs import hub_cache, merge_needs
from streammerge.options import (
    AimOmega,
    AllowNonfinite,
    AsJson,
    Base,
    Device,
    DeviceMap,
    DryRun,
    FisherFrom,
    Ft,
    Hub,
    HubBase,
    HubFt,
    MaxRam,
    MaxShard,
    MaxVram,
    MethodName,
    NoDiskCheck,
    NoReport,
    Out,
    Overwrite,
    PushToHub,
    Quiet,
    RecipeFile,
    SaveFisher,
    Threads,
    TrustRemoteCode,
    calibration_settings,
    fisher_settings,
    parameter_help,
    push_settings,
)
from streammerge.recipe import load_recipe, make_recipe
from streammerge.report import block_rows, is_short, plan_text, table
from streammerge.text import all_visible, visible
from streammerge.units import format_size, parse_size


def merge(
    recipe: RecipeFile = None,
    base: Base = None,
    ft: Ft = None,
    hub_base: HubBase = None,
    hub_ft: HubFt = None,
    hub_mode: Hub = "cache",
    out: Out = None,
    push_to_hub: PushToHub = None,
    method: MethodName = None,
    aim: AimOmega = None,
    fisher: FisherFrom = None,
    save_fisher: SaveFisher = None,
    device: Device = None,
    max_vram: MaxVram = None,
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_ram: MaxRam = "256MiB",
    max_shard_size: MaxShard = None,
    threads: Threads = None,
    allow_nonfinite: AllowNonfinite = False,
    no_disk_check: NoDiskCheck = False,
    no_report: NoReport = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Merge fine-tuned models into a base model.

    Example: streammerge --base Qwen/Qwen2.5-Math-7B --ft deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --out merged
    """
    values = load_recipe(recipe) if recipe else {}
    values |= _models(base, ft, hub_base, hub_ft)
    settings = {
        "method": method,
        "max_shard_bytes": max_shard_size and parse_size(max_shard_size, "--max-shard-size"),
        "fisher_from": fisher or None,
        "aim": aim,
    }
    values |= {key: value for key, value in settings.items() if value is not None}
    if allow_nonfinite:
        values["allow_nonfinite"] = True
    values["fisher"] = {**_mapping(values, "fisher"), **fisher_settings(options)}
    values["calibration"] = {**_mapping(values, "calibration"), **calibration_settings(options)}
    given = {name: options[name] for name in parameter_help() if options.get(name)}
    values["parameters"] = {**_mapping(values, "parameters"), **{k: _plain(v) for k, v in given.items()}}
    if "models" in values:
        values["models"] = _without(values["models"], given)
    if recipe is None and "base" not in values:
        raise typer.BadParameter("give the base model", param_hint="--base")
    if recipe is None and not values.get("models"):
        raise typer.BadParameter("give a fine-tuned model", param_hint="--ft")
    job = make_recipe(values)
    push_values = {**push_settings(options), **({} if push_to_hub is None else {"repository": push_to_hub})}
    if push_values and push_to_hub is None:
        name = f"--{next(iter(push_values)).replace('_', '-')}"
        raise typer.BadParameter("goes with --push-to-hub only", param_hint=name)
    budget = parse_size(max_ram, "--max-ram")
    if dry_run:
        run = FisherRun(device, parse_size(max_vram, "--max-vram") if max_vram else None, device_map, trust_remote_code)
        push = make_publication(push_values or None)
        if push is not None:
            push.check(keep=True)  # whether there will be an --out, nobody can tell: see its notes
        uploads = push is not None
        with streammerge.plan(job, max_ram=budget, threads=threads, hub_mode=hub_mode, uploads=uploads) as planned:
            summary = planned.summary(run)
            if push is not None:
                summary["push"] = push.check_merge(planned, out, overwrite=overwrite)
            if out is not None:
                check_output(out, [model.folder for model in (planned.base, *planned.experts)], overwrite)
                if (out / WORK_DIR).is_dir():
                    what = "--overwrite starts it anew" if overwrite else "the same merge goes on where it stopped"
                    summary["notes"] = [*summary["notes"], f"output folder {out} holds an unfinished run: {what}"]
            where = out if out is not None or push is None else push.folder()
            summary |= _resources(planned, where, save_fisher, keep=out is not None, overwrite=overwrite)
        show(summary if json else plan_text(all_visible(summary)))
        if is_short(summary):
            raise typer.Exit(1)
        return
    if out is None and push_to_hub is None:
        raise typer.BadParameter("give the output folder, or --push-to-hub", param_hint="--out")
    result = streammerge.merge(
        job,
        out,
        push_to_hub=push_values or None,
        max_ram=budget,
        threads=threads,
        hub_mode=hub_mode,
        device=device,
        max_vram=parse_size(max_vram, "--max-vram") if max_vram else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        save_fisher=save_fisher,
        overwrite=overwrite,
        check_disk=not no_disk_check,
        report=not no_report,
        progress=not quiet,
    )
    show(result if json else _merged_text(all_visible(result), out), _done(result, out))


def plan(**options: Any) -> None:
    """Say what a merge would read, write and hold, and what is wrong with it; reads headers only."""
    merge(dry_run=True, **options)


def _models(base: str | None, ft: list[str] | None, hub_base: str | None, hub_ft: list[str] | None) -> dict[str, Any]:
    if base and hub_base:
        raise typer.BadParameter("give one of --base and --hub-base", param_hint="--hub-base")
    values: dict[str, Any] = {}
    if base or hub_base:
        values["base"] = HUB_SCHEME + hub_base if hub_base else base
    models = [*(ft or []), *(HUB_SCHEME + name for name in hub_ft or [])]
    if models:
        values["models"] = models
    return values


def _resources(
    planned: streammerge.MergePlan, where: Path | None, save_fisher: Path | None, *, keep: bool, overwrite: bool
) -> dict[str, Any]:
    """What of disk and memory is needed and there; without an output folder, as if it were in the current one."""
    needs = merge_needs(
        planned,
        where or Path("merged").absolute(),
        downloads=hub_cache(planned),
        save_fisher=save_fisher,
        keep=keep or where is None,
        overwrite=overwrite,
    )
    disks = [{"needed": room.missing, "free": room.free, "text": room.text()} for room in rooms(needs)]
    most = min(memory_limits().values(), default=None)
    return {"disks": disks, "available_host_bytes": available_memory(), "most_host_bytes": most}


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise RecipeError(f"recipe: {key}: must be a mapping, not {value!r}")
    return value


def _without(models: Any, given: dict[str, Any]) -> Any:
    """A recipe's models without the per-model values that the command line overrides."""
    if not isinstance(models, list):
        return models
    return [
        {**model, "parameters": {k: v for k, v in model["parameters"].items() if k not in given}}
        if isinstance(model, dict) and isinstance(model.get("parameters"), dict)
        else model
        for model in models
    ]


def _plain(values: list[str]) -> Any:
    """One value for all, or a list with one per fine-tuned model."""
    return values[0] if len(values) == 1 else values


def _done(result: dict[str, Any], out: Path | None) -> str:
    places = [str(out)] if out is not None else []
    return f"the merge is complete: {' and '.join([*places, *([result['push']['url']] if 'push' in result else [])])}"


def _merged_text(result: dict[str, Any], out: Path | None) -> str:
    size = sum(shard["bytes"] for shard in result["shards"].values())
    lines = [f"note: {note}" for note in result["notes"]]
    if result["blocks"]:
        lines = [table(*block_rows(result)), "", *lines]
    merged = sum("coefficient" in tensor for tensor in result["tensors"].values())
    copied = len(result["tensors"]) - merged
    where = f" in {visible(str(out))}" if out is not None else ""
    lines.append(f"{merged} tensors merged, {copied} copied from the base: {format_size(size)}{where}")
    if "push" in result:
        lines.append(pushed_text(result["push"]))
    return "\n".join(lines)
