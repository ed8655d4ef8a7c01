"""The options of the command line, apart from what the commands do.

The methods' parameters and the Fisher settings become options by themselves, from their schemas: a new
method needs no line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from streammerge.fisher.store import FisherSettings
from streammerge.methods import METHODS
from streammerge.recipe import DEFAULT_METHOD

MODELS, METHOD, FISHER, RESOURCES = "Models", "Parameters of the methods", "Fisher", "Resources"

RecipeFile = Annotated[Path | None, typer.Argument(help="YAML recipe; options override its values.")]
Base = Annotated[str | None, typer.Option(help="Base model: folder or org/name\\[@revision].", rich_help_panel=MODELS)]
Ft = Annotated[
    list[str] | None, typer.Option(help="Fine-tuned model, likewise. Repeat for several.", rich_help_panel=MODELS)
]
HubBase = Annotated[str | None, typer.Option(help="Base model, always from the Hub.", rich_help_panel=MODELS)]
HubFt = Annotated[
    list[str] | None, typer.Option(help="Fine-tuned model, always from the Hub. Repeat.", rich_help_panel=MODELS)
]
MethodName = Annotated[
    str | None, typer.Option("--method", "-m", help=f"Merge method: {', '.join(METHODS)}. (default: {DEFAULT_METHOD})")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder: new, empty, or left unfinished.")]
FisherFrom = Annotated[
    Path | None, typer.Option("--fisher", help="Folder of a Fisher to reuse.", rich_help_panel=FISHER)
]
SaveFisher = Annotated[
    Path | None, typer.Option(help="Keep the Fisher in this folder, for other merges.", rich_help_panel=FISHER)
]
Device = Annotated[
    str | None, typer.Option(help="Where a Fisher pass runs: cpu, cuda, cuda:1. (default: a GPU if there is one)")
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
        help="Run Python code that the base model brings, for a Fisher pass. From the Hub, pin it: org/name@COMMIT.",
    ),
]
MaxRam = Annotated[
    str, typer.Option(help="Host memory for buffers, besides the import of torch.", rich_help_panel=RESOURCES)
]
MaxShard = Annotated[
    str | None, typer.Option(help="Largest shard of the output. (default: 5GB)", rich_help_panel=RESOURCES)
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Workers. (default: the processors, at most 8)", rich_help_panel=RESOURCES)
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the inputs through.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out, or start anew.")]
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
        flag = field.annotation is bool
        name = key if flag else f"fisher_{key}"
        default = "" if field.default in (None, False) else f" (default: {field.default})"
        text = f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}{default}."
        names = [key, name] if bare and not flag else [name]
        option = typer.Option(*(f"--{name.replace('_', '-')}" for name in names), help=text, rich_help_panel=FISHER)
        kind: Any = Annotated[bool, option] if flag else Annotated[str | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False if flag else None, annotation=kind)


def fisher_settings(options: dict[str, Any]) -> dict[str, Any]:
    named = {key: options.get(key, options.get(f"fisher_{key}")) for key in FisherSettings.model_fields}
    return {key: value for key, value in named.items() if value not in (None, False)}
