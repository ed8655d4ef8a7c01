"""`streammerge push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.options import AsJson, Quiet, Repository, push_settings
from streammerge.text import all_visible


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
    text = pushed_text(all_visible(result))
    show(result if json else text, text)


def pushed_text(result: dict[str, Any]) -> str:
    return f"pushed: {result['url']}" if result["new"] else f"already there, nothing to push: {result['url']}"
