"""What `streammerge diagnose` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.report import table

Columns = Sequence[tuple[str, str, str]]  # heading, key, format

_COLLAPSE: Columns = (
    ("variance", "activation_variance", "#.4g"),
    ("/ sources", "variance_ratio", ".3f"),
    ("effective rank", "effective_rank", ".2f"),
    ("/ sources", "rank_ratio", ".3f"),
    ("norm shrinkage", "norm_shrinkage", ".4f"),
    ("angle^2", "mean_squared_angle", ".3e"),
)
_NONLINEARITY: Columns = (
    ("nonlinearity", "nonlinearity", ".4f"),
    ("relative merging error", "relative_merging_error", ".3e"),
    ("change", "change", ".3e"),
)


def diagnose_text(result: Mapping[str, Any]) -> str:
    """A table of the blocks, their means in the last row, and what they say in words."""
    settings = DiagnoseSettings.model_validate(result["settings"])
    ran = f"{settings.tokens}; {result['compute_dtype']} on {result['device']}"
    model, sources = result["model"]["id"], [source["id"] for source in result["against"]]
    if settings.nonlinearity:
        columns, lines = _NONLINEARITY, _correlation(result)
        lines.append(f"from {sources[0]} to {model} at alpha {settings.alpha}: {ran}")
    else:
        columns, lines = _COLLAPSE, _proxy(result)
        lines.append(f"{model} against {' and '.join(sources)}: {ran}")
    return "\n".join([_table(columns, result), "", *lines, *(f"note: {note}" for note in result["notes"])])


def _table(columns: Columns, result: Mapping[str, Any]) -> str:
    rows = [[str(row["block"]), *_cells(columns, row)] for row in result["blocks"]]
    rows.append(["mean", *_cells(columns, result["mean"])])
    return table(["block", *(heading for heading, _, _ in columns)], rows)


def _cells(columns: Columns, row: Mapping[str, Any]) -> list[str]:
    return ["-" if row[key] is None else format(row[key], form) for _, key, form in columns]


def _proxy(result: Mapping[str, Any]) -> list[str]:
    count = len(result["against"])
    plain = f" ({1 / math.sqrt(count):.2f} for the plain mean of {count} models that share nothing)"
    return [
        f"sum over the blocks of the mean squared angle to the sources: {result['proxy_objective']:.4e} rad^2",
        "Collapse shows as ratios well below 1: activations vary less and in fewer directions than the sources', and "
        f"blocks are shorter{plain if count > 1 else ''}; ratios near 1 mean none.",
    ]


def _correlation(result: Mapping[str, Any]) -> list[str]:
    if result["pearson"] is None:
        return []
    return [f"Pearson correlation of nonlinearity and relative merging error: {result['pearson']:.3f}"]
