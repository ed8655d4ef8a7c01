"""`streammerge eval`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.evaluation.run import BATCH_SIZE
from streammerge.evaluation.settings import EvaluationSettings
from streammerge.evaluation.text import comparison_text, evaluation_text
from streammerge.options import AsJson, Device, Overwrite, Quiet, TrustRemoteCode, evaluation_settings
from streammerge.schema import build_from_options
from streammerge.text import all_visible


def eval(
    models: Annotated[
        list[str],
        typer.Argument(help="Folder or org/name\\[@revision]; with --compare several, or folders of results."),
    ],
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Put models side by side: those that are folders of results as they are, others evaluated.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for results and responses, task by task; what is done there is not done again."
        ),
    ] = None,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Responses generated at a time; fewer take less memory.")
    ] = BATCH_SIZE,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Measure accuracy and length of a model's answers on the papers' six sets of mathematical problems.

    Needs lm-evaluation-harness and math-verify: pip install -c constraints.txt '.\\[eval]' in the checkout. A run that
    was stopped goes on with the tasks that are not in --out.

    Example: streammerge eval merged --tasks gsm8k,math500 --limit 100 --out results/merged

    Then: streammerge eval --compare results/base results/reasoner results/merged --out results
    """
    if len(models) > 1 and not compare:
        raise typer.BadParameter("several models go with --compare", param_hint="MODEL")
    call = partial(streammerge.compare, models) if compare else partial(streammerge.evaluate, models[0])
    result = call(
        build_from_options(EvaluationSettings, evaluation_settings(options)),
        out=out,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        progress=not quiet,
    )
    text = comparison_text if compare else evaluation_text
    done = "" if out is None else f"the results are in {out}"
    show(result if json else text(all_visible(result)), done)
