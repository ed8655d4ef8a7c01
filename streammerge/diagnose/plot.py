"""The figures of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError, TransferError
from streammerge.figures import GET_IT, can_draw, from_zero, over_blocks, picture, stacked, style

_FORMATS = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be made, before anything is measured.

    Raises:
        RecipeError: matplotlib is not installed; a file type that is none of ours.
        TransferError: there is no such folder.
    """
    if not can_draw():
        raise RecipeError(f"--plot needs matplotlib, which is not installed: {GET_IT}")
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
    content = picture(figure, path.suffix[1:].lower())
    try:
        path.write_bytes(content)
    except OSError as error:
        raise TransferError(f"--plot {path}: cannot be written: {error.strerror}") from error


def _collapse(result: Mapping[str, Any]) -> Any:
    figure, axes = stacked(7, 7, 3)
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

    figure, (top, bottom, scatter) = stacked(11, 5, 2, beside=True)
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


def _line(axis: Any, result: Mapping[str, Any], key: str, label: str, marker: str, least: float = 0) -> None:
    """One column over the blocks, from zero to at least `least`."""
    numbers = [row["block"] for row in result["blocks"]]
    values = [math.nan if row[key] is None else row[key] for row in result["blocks"]]  # a gap
    axis.plot(numbers, values, **{**style(0), "marker": marker})
    over_blocks(axis, label)
    from_zero(axis, values, least)
