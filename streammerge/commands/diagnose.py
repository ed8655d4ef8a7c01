"""`streammerge diagnose`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.diagnose.text import diagnose_text
from streammerge.options import Against, AsJson, Device, Hub, Plot, Quiet, TrustRemoteCode, diagnose_settings
from streammerge.schema import build_from_options
from streammerge.text import all_visible


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
        build_from_options(DiagnoseSettings, diagnose_settings(options)),
        hub_mode=hub_mode,
        device=device,
        trust_remote_code=trust_remote_code,
        plot=plot,
        progress=not quiet,
    )
    show(result if json else diagnose_text(all_visible(result)))
