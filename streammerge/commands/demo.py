"""`streammerge demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streammerge.commands.printing import printed
from streammerge.options import Quiet


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merges.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Merge a small long-to-short pair by six methods, and show what each keeps of accuracy and length."""
    from streammerge.demo import run

    with printed(f"the merges are in {out}"):
        run(out, progress=not quiet)
