"""The figures of a diagnosis; matplotlib, an optional dependency, is imported when one is asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError, TransferError

_FORMATS = (".png", ".pdf", ".svg")
_DPI = 150


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be made, before anything is measured.

    Raises:
        RecipeError: matplotlib is not installed; a file type that is none of ours.
        TransferError: there is no such folder.
    """
    if find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib, which is not installed: pip install 'streammerge[plot]'")
    if path.suffix.lower() not in _FORMATS:
        raise RecipeError(f"--plot {path}: the name must end with {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    if not path.parent.is_dir():
        raise TransferError(f"--plot {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise TransferError(f"--plot {path}: is a folder")


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw what `diagnose` returned: told apart by markers and dashes, so it reads the same without colour.

    Raises:
        TransferError: the file cannot be written.
    """
    figure = _nonlinearity(result) if result["settings"]["nonlinearity"] else _collapse(result)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=_DPI)
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise TransferError(f"--plot {path}: cannot be written: {error.strerror}") from error


def _collapse(result: Mapping[str, Any]) -> Any:
    figure, axes = _figure(7, 7, 3)
    panels = (
        ("variance_ratio", "activation variance\nover the sources'", "o"),
        ("rank_ratio", "effective rank\nover the sources'", "s"),
        ("norm_shrinkage", "block norm\nover the sources'", "^"),
    )
    for axis, (key, label, marker) in zip(axes, panels, strict=True):
        _line(axis, result, key, label, marker, least=1)
        axis.axhline(1, color="0.4", linewidth=1)
    count = len(result["against"])
    if count > 1:
        axes[2].axhline(1 / math.sqrt(count), color="0.4", linewidth=1, linestyle=":")
        axes[2].annotate(
            f"mean of {count} that share nothing",
            (0.01, 1 / math.sqrt(count)),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8,
        )
    axes[2].set_xlabel("decoder block")
    return figure


def _nonlinearity(result: Mapping[str, Any]) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, (top, bottom, scatter) = _figure(11, 5, 2, beside=True)
    _line(top, result, "nonlinearity", "nonlinearity", "o")
    _line(bottom, result, "relative_merging_error", "relative merging error", "s")
    bottom.set_xlabel("decoder block")
    used = [row for row in result["blocks"] if row["block"] in result["correlated_blocks"]]
    xs, ys = ([row[key] for row in used] for key in ("nonlinearity", "relative_merging_error"))
    scatter.plot(xs, ys, "o", color="black", markersize=4)
    for row, x, y in zip(used, xs, ys, strict=True):
        scatter.annotate(str(row["block"]), (x, y), xytext=(0, 4), textcoords="offset points", fontsize=7, ha="center")
    told = "undefined" if result["pearson"] is None else f"{result['pearson']:.3f}"
    scatter.set(xlabel="nonlinearity", ylabel="relative merging error", title=f"Pearson correlation {told}")
    scatter.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def _figure(width: float, height: float, rows: int, beside: bool = False) -> tuple[Any, Sequence[Any]]:
    """A figure of panels one above another over the blocks, and with `beside` one more to the right."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state outside the figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(rows, 2 if beside else 1)
    axes = [figure.add_subplot(grid[0, 0])]
    axes += [figure.add_subplot(grid[row, 0], sharex=axes[0]) for row in range(1, rows)]
    if beside:
        axes.append(figure.add_subplot(grid[:, 1]))
    return figure, axes


def _line(axis: Any, result: Mapping[str, Any], key: str, label: str, marker: str, least: float = 0) -> None:
    """One column over the blocks, from zero to at least `least`: cut off, a percent would look like a fall."""
    from matplotlib.ticker import MaxNLocator

    numbers = [row["block"] for row in result["blocks"]]
    values = [math.nan if row[key] is None else row[key] for row in result["blocks"]]  # a gap
    axis.plot(numbers, values, marker=marker, color="black", linewidth=1, markersize=4)
    axis.set_ylabel(label)
    top = max([least, *(value for value in values if not math.isnan(value))])
    axis.set_ylim(0, 1.1 * top or 1)
    axis.grid(color="0.85")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
