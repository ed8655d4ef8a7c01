"""The options of the command line, apart from what the commands do.

The methods' parameters and the Fisher settings become options by themselves, from their schemas: a new
method needs no line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from streammerge.calibration.store import CalibrationSettings
from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.evaluation.settings import EvaluationSettings
from streammerge.fisher.store import FisherSettings
from streammerge.hub.settings import PushSettings
from streammerge.methods import METHODS
from streammerge.recipe import DEFAULT_METHOD, Recipe

MODELS, METHOD, RESOURCES = "Models", "Parameters of the methods", "Resources"
FISHER, CALIBRATION, DIAGNOSIS = "Fisher", "Calibration text", "Diagnosis"
HUB, SOURCES, EVALUATION = "Push to the Hub", "Sources", "Evaluation"


def _described(model: type[BaseModel], key: str) -> str:
    text = model.model_fields[key].description or ""
    return f"{text[:1].upper()}{text[1:]}."


RecipeFile = Annotated[Path | None, typer.Argument(help="YAML recipe; options override its values.")]
Base = Annotated[str | None, typer.Option(help="Base model: folder or org/name\\[@revision].", rich_help_panel=MODELS)]
Ft = Annotated[
    list[str] | None, typer.Option(help="Fine-tuned model, likewise. Repeat for several.", rich_help_panel=MODELS)
]
HubBase = Annotated[str | None, typer.Option(help="Base model, always from the Hub.", rich_help_panel=MODELS)]
HubFt = Annotated[
    list[str] | None, typer.Option(help="Fine-tuned model, always from the Hub. Repeat.", rich_help_panel=MODELS)
]
Hub = Annotated[
    Any,  # a HubMode
    typer.Option(
        "--hub-mode",
        metavar="cache|stream",
        help="Models on the Hub: download files into the Hub's cache as they are needed, or read byte ranges only and "
        "keep nothing.",
        rich_help_panel=MODELS,
    ),
]
MethodName = Annotated[
    str | None, typer.Option("--method", "-m", help=f"Merge method: {', '.join(METHODS)}. (default: {DEFAULT_METHOD})")
]
AimOmega = Annotated[
    float | None,
    typer.Option("--aim", metavar="OMEGA", min=0, max=1, help=_described(Recipe, "aim"), rich_help_panel=CALIBRATION),
]
Against = Annotated[
    list[str],
    typer.Option(help="Model it was merged from, or for --nonlinearity its base. Repeat.", rich_help_panel=MODELS),
]
Plot = Annotated[
    Path | None, typer.Option(help="Draw the blocks into this file: .png, .pdf or .svg; needs matplotlib.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        help=f"Push the result: {PushSettings.model_fields['repository'].description}.",
        metavar="ORG/NAME",
        rich_help_panel=HUB,
    ),
]
Repository = Annotated[str, typer.Argument(help=_described(PushSettings, "repository"))]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder: new, empty, or left unfinished.")]
FisherFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--fisher",
        help="Folder of a Fisher to reuse; for fisher_average the base's and then each fine-tuned model's.",
        rich_help_panel=FISHER,
    ),
]
SaveFisher = Annotated[
    Path | None, typer.Option(help="Keep the Fisher in this folder, for other merges.", rich_help_panel=FISHER)
]
Device = Annotated[
    str | None, typer.Option(help="Where models run: cpu, cuda, cuda:1. (default: a GPU if there is one)")
]
MaxVram = Annotated[
    str | None,
    typer.Option(
        help="GPU memory of a Fisher pass; with room, blocks stay there and are read once. (default: 90% of the free)",
        rich_help_panel=RESOURCES,
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        help="Which blocks stay on the device in a Fisher pass: auto, or a JSON file of module names and devices.",
        rich_help_panel=RESOURCES,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model brings, where it is run. From the Hub, pin it: org/name@COMMIT.",
    ),
]
MaxRam = Annotated[
    str, typer.Option(help="Host memory for buffers, besides the import of torch.", rich_help_panel=RESOURCES)
]
MaxShard = Annotated[
    str | None, typer.Option(help="Largest shard of the output. (default: 5GB)", rich_help_panel=RESOURCES)
]
NoDiskCheck = Annotated[
    bool,
    typer.Option(
        "--no-disk-check",
        help="Begin though a disk says it has no room: one that compresses, or does not tell the truth.",
        rich_help_panel=RESOURCES,
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Workers. (default: the processors, at most 8)", rich_help_panel=RESOURCES)
]
Sources = Annotated[
    bool,
    typer.Option(
        "--sources",
        help="Also merge tensors from the inputs again and compare them, bit for bit.",
        rich_help_panel=SOURCES,
    ),
]
Sample = Annotated[
    str | None, typer.Option(metavar="N|all", help="How many tensors. (default: 16)", rich_help_panel=SOURCES)
]
SampleSeed = Annotated[int | None, typer.Option(min=0, help="Which ones. (default: 0)", rich_help_panel=SOURCES)]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the inputs through.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out, or start anew.")]
NoReport = Annotated[
    bool, typer.Option("--no-report", help="Leave out report.html, the figures of the merge; they take a second.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only plan: read headers, check, print.")]


def parameter_help() -> dict[str, str]:
    """Every method parameter with its description, and the default of each method that has it."""
    texts: dict[str, str] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    for name, method in METHODS.items():
        for schema in (method.Parameters, method.Expert):
            for key, field in schema.model_fields.items():
                texts.setdefault(key, field.description or "")
                defaults.setdefault(key, {}).setdefault(str(field.default).lower(), []).append(name)
    for key, by_value in defaults.items():
        told = "; ".join(f"{', '.join(methods)}: {value}" for value, methods in by_value.items())
        texts[key] = f"{texts[key][:1].upper()}{texts[key][1:]} ({told})."
    return texts


def method_options() -> Iterator[inspect.Parameter]:
    for key, text in parameter_help().items():
        option = typer.Option(f"--{key.replace('_', '-')}", help=text, rich_help_panel=METHOD, metavar="VALUE")
        yield inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, option]
        )


def fisher_options(bare: bool = False) -> Iterator[inspect.Parameter]:
    """An option for each setting of the Fisher; with `bare`, its name alone does too."""
    for key, field in FisherSettings.model_fields.items():
        name = key if field.annotation is bool else f"fisher_{key}"
        yield _setting_option(name, field, FISHER, [key] if bare and name != key else [])


def fisher_settings(options: dict[str, Any]) -> dict[str, Any]:
    named = {key: options.get(key, options.get(f"fisher_{key}")) for key in FisherSettings.model_fields}
    return {key: value for key, value in named.items() if value not in (None, False)}


def calibration_options() -> Iterator[inspect.Parameter]:
    """`--calibration` for the text, and an option for each other setting of a calibration."""
    for key, field in CalibrationSettings.model_fields.items():
        yield _setting_option("calibration" if key == "text" else f"calibration_{key}", field, CALIBRATION)


def calibration_settings(options: dict[str, Any]) -> dict[str, Any]:
    names = {key: "calibration" if key == "text" else f"calibration_{key}" for key in CalibrationSettings.model_fields}
    return {key: options[name] for key, name in names.items() if options.get(name)}


def diagnose_options() -> Iterator[inspect.Parameter]:
    for key, field in DiagnoseSettings.model_fields.items():
        yield _setting_option(key, field, DIAGNOSIS)


def diagnose_settings(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in DiagnoseSettings.model_fields if options.get(key)}


def evaluation_options() -> Iterator[inspect.Parameter]:
    for key, field in EvaluationSettings.model_fields.items():
        yield _setting_option(key, field, EVALUATION)


def evaluation_settings(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in EvaluationSettings.model_fields if options.get(key) is not None}


def push_options() -> Iterator[inspect.Parameter]:
    """An option for each setting of a push but the repository."""
    for key, field in PushSettings.model_fields.items():
        if key == "private":
            option = typer.Option("--private/--no-private", help=_described(PushSettings, key), rich_help_panel=HUB)
            kind = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(key, kind, default=None, annotation=Annotated[bool | None, option])
        elif key != "repository":
            yield _setting_option(key, field, HUB)


def push_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, empty texts too; a flag that was not given is False, but for `private`."""
    given = {key: options.get(key) for key in PushSettings.model_fields}
    given["create_pr"] = given["create_pr"] or None
    return {key: value for key, value in given.items() if value is not None and value != []}


def _setting_option(name: str, field: FieldInfo, panel: str, aliases: Sequence[str] = ()) -> inspect.Parameter:
    """The option of one field of a settings schema: a flag, a value, or for a list a value that may be repeated."""
    value = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    default = "" if value in (None, False, [], PydanticUndefined) else f" (default: {value})"
    text = f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}{default}."
    names = [f"--{n.replace('_', '-')}" for n in (*aliases, name)]
    option = typer.Option(*names, help=text, rich_help_panel=panel, metavar=_value_shown(field))
    if field.annotation is bool:
        kind: Any = Annotated[bool, option]
    else:
        several = field.default is PydanticUndefined or field.default == []
        kind = Annotated[list[str] | None if several else str | None, option]
    unset = False if field.annotation is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=unset, annotation=kind)


def _value_shown(field: FieldInfo) -> str | None:
    """What the help shows for the value, which is text until the settings are made of it."""
    kinds = {field.annotation, *get_args(field.annotation)}
    return next((f"<{name}>" for kind, name in _KINDS.items() if kind in kinds), None)


_KINDS = {int: "int", float: "float", Path: "path"}
