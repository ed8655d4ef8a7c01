"""`streammerge demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streammerge.options import Quiet


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pair and the merge.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Make a small pair of models on the spot, merge it with FIM-TIES and generate text from the result."""
    from streammerge.demo import run

    run(out, progress=not quiet)
