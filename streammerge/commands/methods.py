"""`streammerge methods`."""

from __future__ import annotations

from typing import Annotated

import typer

import streammerge
from streammerge.commands.printing import show
from streammerge.options import AsJson


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
        show(method.plain() if json else method.text())
    elif markdown:
        show(streammerge.catalogue.markdown())
    else:
        show(streammerge.catalogue.listing() if json else streammerge.catalogue.listing_text())
