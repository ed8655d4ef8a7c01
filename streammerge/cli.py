"""The command line: each command is one call of the library. Results to stdout, progress and errors to stderr."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import streammerge
from streammerge import signals
from streammerge.checkpoints.disk_space import rooms
from streammerge.checkpoints.locate import HUB_SCHEME
from streammerge.checkpoints.output import check_output
from streammerge.diagnose.text import diagnose_text
from streammerge.errors import CheckpointError, RecipeError, StreammergeError
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.store import FisherRecord, FisherSettings
from streammerge.host import available_memory, memory_limits
from streammerge.hub.publication import make_publication
from streammerge.needs import hub_cache, merge_needs
from streammerge.options import (
    Against,
    AimOmega,
    AllowNonfinite,
    AsJson,
    Base,
    Debug,
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
    Out,
    Overwrite,
    Plot,
    PushToHub,
    Quiet,
    RecipeFile,
    Repository,
    Sample,
    SampleSeed,
    SaveFisher,
    Sources,
    Threads,
    TrustRemoteCode,
    calibration_options,
    calibration_settings,
    diagnose_options,
    diagnose_settings,
    fisher_options,
    fisher_settings,
    method_options,
    parameter_help,
    push_options,
    push_settings,
)
from streammerge.recipe import load_recipe, make_recipe
from streammerge.report import block_rows, fisher_rows, is_short, plan_text, table, verified_text
from streammerge.schema import build
from streammerge.text import all_visible, visible
from streammerge.units import format_size, parse_size

app = typer.Typer(
    name="streammerge",
    help="Merge large language-model checkpoints, streamed: never two models in memory.\n\n"
    "Without a command, `merge` is meant: streammerge --base A --ft B --out merged",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    settings = {"method": method, "max_shard_bytes": max_shard_size, "fisher_from": fisher or None, "aim": aim}
    values |= {key: value for key, value in settings.items() if value is not None}
    if allow_nonfinite:
        values["allow_nonfinite"] = True
    values["fisher"] = {**_mapping(values, "fisher"), **fisher_settings(options)}
    values["calibration"] = {**_mapping(values, "calibration"), **calibration_settings(options)}
    given = {name: options[name] for name in parameter_help() if options.get(name)}
    values["parameters"] = {**_mapping(values, "parameters"), **{k: _plain(v) for k, v in given.items()}}
    values["models"] = _without(values.get("models"), given)
    if "base" not in values:
        raise typer.BadParameter("give the base model", param_hint="--base")
    if not values.get("models"):
        raise typer.BadParameter("give a fine-tuned model", param_hint="--ft")
    job = make_recipe(values)
    push_values = {**push_settings(options), **({} if push_to_hub is None else {"repository": push_to_hub})}
    if push_values and push_to_hub is None:
        name = f"--{next(iter(push_values)).replace('_', '-')}"
        raise typer.BadParameter("goes with --push-to-hub only", param_hint=name)
    budget = parse_size(max_ram)
    if dry_run:
        run = FisherRun(device, parse_size(max_vram) if max_vram else None, device_map, trust_remote_code)
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
            where = out if out is not None or push is None else push.folder()
            summary |= _resources(planned, where, save_fisher, keep=out is not None, overwrite=overwrite)
        _print(summary if json else plan_text(all_visible(summary)))
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
        max_vram=parse_size(max_vram) if max_vram else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        save_fisher=save_fisher,
        overwrite=overwrite,
        check_disk=not no_disk_check,
        progress=not quiet,
    )
    _print(result if json else _merged_text(all_visible(result), out))


def plan(**options: Any) -> None:
    """Say what a merge would read, write and hold, and what is wrong with it; reads headers only."""
    merge(dry_run=True, **options)


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
        build(FisherSettings, fisher_settings(options), "Fisher settings"),
        hub_mode=hub_mode,
        device=device,
        max_vram=parse_size(max_vram) if max_vram else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=parse_size(max_shard_size or "5GB"),
        overwrite=overwrite,
        check_disk=not no_disk_check,
        progress=not quiet,
    )
    _print(record.model_dump() if json else _fisher_text(record, out))


def push(
    folder: Annotated[Path, typer.Argument(help="The output folder of a merge.")],
    repository: Repository,
    json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Push a finished merge to the Hugging Face Hub: checked against its manifest, in one commit.

    Example: streammerge push merged my-name/merged --private
    """
    result = streammerge.push(folder, repository, **push_settings(options), progress=not quiet)
    _print(result if json else _pushed_text(all_visible(result)))


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
    given |= {"hub_mode": hub_mode, "max_ram": parse_size(max_ram), "threads": threads}
    try:
        result = streammerge.verify(folder, sources=given if sources else None, progress=not quiet)
    except CheckpointError as error:
        if not json:
            raise
        result = {"ok": False, "problems": [str(error)]}
    _print(result if json else verified_text(all_visible(result), visible(str(folder))))
    if not result["ok"]:
        raise typer.Exit(1)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: formula, parameters, convention, reference.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/methods.md, the page of all.")] = False,
    json: AsJson = False,
) -> None:
    """List the merge methods, or say all about one.

    Example: streammerge methods fim_ties
    """
    if markdown and (name or json):
        raise typer.BadParameter("goes with nothing else", param_hint="--markdown")
    if name:
        method = streammerge.catalogue.describe(name)
        _print(method.plain() if json else method.text())
    elif markdown:
        _print(streammerge.catalogue.markdown())
    else:
        _print(streammerge.catalogue.listing() if json else streammerge.catalogue.listing_text())


def diagnose(
    model: Annotated[str, typer.Argument(help="The merged model: folder or org/name\\[@revision].")],
    against: Against,
    hub_mode: Hub = "cache",
    plot: Plot = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Say whether a merged model's decoder blocks have collapsed, or how far from linear a fine-tuned model's are.

    Example: streammerge diagnose merged --against Qwen/Qwen2.5-Math-7B --against ./my-finetune
    """
    result = streammerge.diagnose(
        model,
        against,
        diagnose_settings(options),
        hub_mode=hub_mode,
        device=device,
        trust_remote_code=trust_remote_code,
        plot=plot,
        progress=not quiet,
    )
    _print(result if json else diagnose_text(all_visible(result)))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pair and the merge.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Make a small pair of models on the spot, merge it with FIM-TIES and generate text from the result."""
    from streammerge.demo import run

    run(out, progress=not quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 for an error of ours, 2 for usage, 130 and 143 by signals."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args:
        args = ["--help"]
    elif args[0] not in _COMMANDS and args[0] not in ("-h", "--help", "--version"):
        args = ["merge", *args]
    try:
        app(args, prog_name="streammerge")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of ours become one line and exit 1; Ctrl-C becomes advice and exit 130, SIGTERM and exit 143."""

    def run(debug: bool = False, **options: Any) -> None:
        try:
            with signals.under_way(command.__name__):
                command(**options)
        except StreammergeError as error:
            if debug:
                raise
            print(f"streammerge: error: {_lines(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            signals.say_farewell(command.__name__)
            raise typer.Exit(stop.status if isinstance(stop, signals.Stopped) else 130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _register(command: Callable[..., None], *extra: inspect.Parameter, like: Any = None, drop: str = "") -> None:
    """Add a command whose `**options` are spelled out as the parameters `extra`."""
    source = inspect.signature(like or command, eval_str=True)
    named = [p for p in source.parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in drop.split()]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*named, *extra, debug)]
    run = _guarded(command)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(command.__name__)(run)


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
        lines.append(_pushed_text(result["push"]))
    return "\n".join(lines)


def _pushed_text(result: dict[str, Any]) -> str:
    return f"pushed: {result['url']}" if result["new"] else f"already there, nothing to push: {result['url']}"


def _fisher_text(record: FisherRecord, out: Path) -> str:
    ratio = f"{record.ratio:.1f}" if record.ratio else "undefined"
    lines = [table(*fisher_rows(record)), "", f"largest over smallest block mean: {ratio}"]
    lines += [f"note: {visible(note)}" for note in record.notes]
    return "\n".join([*lines, f"Fisher of {visible(record.base.id)} in {visible(str(out))}"])


def _print(value: Any) -> None:
    print(_lines(value) if isinstance(value, str) else json.dumps(value, indent=2))


def _lines(text: str) -> str:
    """What goes to the terminal: nothing in it but our own line ends drives it, see `visible`."""
    return "\n".join(map(visible, text.split("\n")))


def _version(value: bool) -> None:
    if value:
        print(f"streammerge {streammerge.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


_options = [*method_options(), *fisher_options(), *calibration_options(), *push_options()]
_register(merge, *_options)
_register(plan, *_options, like=merge, drop="no_disk_check dry_run quiet")
_register(fisher, *fisher_options(bare=True))
_register(push, *push_options())
_register(verify)
_register(methods)
_register(diagnose, *diagnose_options())
_register(demo)
_COMMANDS = {command.name for command in app.registered_commands}
