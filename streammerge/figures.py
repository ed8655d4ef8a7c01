"""What all figures share. matplotlib, an optional dependency, is imported when one is drawn.

Everything is told apart by markers, dashes and greys, so it reads the same without colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from streammerge.extras import get_it
from streammerge.progress import quiet_logger

GET_IT = get_it("plot")
DPI = 150
_MARKERS, _DASHES = "os^Dv", ("-", "--", ":", "-.")
_INKS = {"#000000": "--ink", "#ffffff": "--paper", "#d9d9d9": "--grid", "#666666": "--soft"}  # 0.85 and 0.4


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def style(number: int, lines: bool = True) -> dict[str, Any]:
    """How to draw series `number`: black, with a marker and dashes of its own; 20 differ."""
    dashes = _DASHES[number % len(_DASHES)] if lines else ""
    marker = _MARKERS[number % len(_MARKERS)]
    return {"marker": marker, "linestyle": dashes, "color": "black", "linewidth": 1, "markersize": 4}


def stacked(width: float, height: float, rows: int, beside: bool = False) -> tuple[Any, Sequence[Any]]:
    """A figure of panels one above another over the blocks, and with `beside` one more to the right; inches."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state outside the figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(rows, 2 if beside else 1)
    axes = [figure.add_subplot(grid[0, 0])]
    axes += [figure.add_subplot(grid[row, 0], sharex=axes[0]) for row in range(1, rows)]
    if beside:
        axes.append(figure.add_subplot(grid[:, 1]))
    return figure, axes


def over_blocks(axis: Any, label: str) -> None:
    """Grid, label and whole numbers for an axis over the blocks."""
    from matplotlib.ticker import MaxNLocator

    axis.set_ylabel(label)
    axis.grid(color="0.85")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def from_zero(axis: Any, values: Sequence[float], least: float = 0) -> None:
    """Show all values and zero, up to at least `least`: cut off, a percent would look like a fall. NaN is a gap."""
    finite = [value for value in values if math.isfinite(value)]
    axis.set_ylim(1.1 * min([0, *finite]), 1.1 * max([least, *finite]) or 1)


def coefficients(axis: Any, rows: Sequence[Mapping[str, Any]], names: Mapping[str | None, str]) -> None:
    """The merge coefficients of a manifest's `blocks`, one line for each fine-tuned model.

    Args:
        rows: those with an alpha.
        names: what to call the models; the keys are the rows' `expert`, None where there is only one.
    """
    for number, (expert, name) in enumerate(names.items()):
        points = [(row["block"], row["alpha"]) for row in rows if row.get("expert") == expert]
        whole = len({block for block, _ in points}) == len(points)  # else several tensors of a block: no line
        axis.plot(*zip(*points, strict=True), **style(number, whole), label=drawable(name))
    if len(names) > 1:
        axis.legend(fontsize=8)
    over_blocks(axis, "merge coefficient alpha")
    axis.set_xlabel("decoder block")
    from_zero(axis, [row["alpha"] for row in rows], 1)


def drawable(name: str) -> str:
    """A name in characters that every font has, and none that would begin a formula."""
    return "".join(c if c.isascii() and c.isprintable() and c != "$" else "?" for c in name)


def picture(figure: Any, form: str, *, letters: bool = False) -> bytes:
    """The figure as a file: png, pdf or svg. The same figure gives the same bytes, whenever it is drawn.

    Args:
        letters: an svg keeps its text as text, for whatever font there is; else it is drawn.
    """
    unsigned = {"png": ["Software"], "pdf": ["Creator", "Producer", "CreationDate"], "svg": ["Creator", "Date"]}
    content = io.BytesIO()
    with quiet():
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "streammerge", "svg.fonttype": "none" if letters else "path"}):
            figure.savefig(content, format=form, dpi=DPI, metadata=dict.fromkeys(unsigned[form]))
    return content.getvalue()


def inline(figure: Any, name: str, alt: str) -> str:
    """The figure as an `svg` element for a page, in the page's colours: CSS variables --ink, --paper, --grid, --soft.

    Args:
        name: a word of its own on the page; its ids begin with it.
        alt: the figure in words, safe to stand in an attribute.
    """
    text = picture(figure, "svg", letters=True).decode()
    text = text[text.index("<svg ") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{name}-", text)
    for colour, variable in _INKS.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def quiet() -> AbstractContextManager[None]:
    """matplotlib does not say that its settings and fonts have no home to be kept in."""
    return quiet_logger("matplotlib")
