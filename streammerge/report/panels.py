"""The figures of a merge's report. Models are called 1, 2, ... in them; the page says who they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.figures import coefficients, drawable, over_blocks, stacked, style
from streammerge.timeline import Phase

WIDTH = 4.6  # inches of 96 pixels: a column of the page, and little more than a narrow window
MOST_KINDS = 40
_LONGEST_NAME = 40  # characters that fit above a strip

Numbers = dict[int, list[float]]  # of each block, the values of its tensors


@dataclass(frozen=True)
class Strip:
    """One number of every tensor of a kind, such as `mlp.up_proj.weight`, over the blocks.

    Attributes:
        models: of each fine-tuned model, or of the merged tensor alone.
    """

    kind: str
    models: list[Numbers]

    @property
    def values(self) -> list[float]:
        return [value for model in self.models for values in model.values() for value in values]


def strips(result: Mapping[str, Any], key: str) -> list[Strip]:
    """What the manifest says under `key` of the tensors in decoder blocks; the kept entries as a fraction."""
    found: dict[str, list[Numbers]] = {}
    for name, entry in result["tensors"].items():
        value = entry.get(key)
        if entry.get("block") is None or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        models = found.setdefault(_kind(name, entry["block"]), [{} for _ in values])
        for model, number in zip(models, values, strict=True):
            if isinstance(number, (int, float)) and math.isfinite(number):
                share = number / max(entry["numel"], 1) if key == "kept" else number
                model.setdefault(entry["block"], []).append(share)
    return [strip for kind, models in found.items() if (strip := Strip(kind, models)).values]


def _kind(name: str, block: int) -> str:
    """The name without its block's number and what comes before, and with * for the number of an expert."""
    inside = name.partition(f".{block}.")[2] or name
    return ".".join("*" if part.isdigit() else part for part in inside.split("."))


def coefficient_panel(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Merge coefficient over the blocks."""
    figure, (axis,) = stacked(WIDTH, 2.7, 1)
    coefficients(axis, rows, {expert: f"model {number}" for number, expert in enumerate(experts_of(rows), 1)})
    return figure


def experts_of(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The fine-tuned models that rows of the block table are about, in their order."""
    return list(dict.fromkeys(row.get("expert") for row in rows))


def size_panel(rows: Sequence[Mapping[str, Any]]) -> Any | None:
    """Mean Fisher and mean square of the task vector over the blocks, on log scales; None where neither is known."""
    shown = [
        (key, label)
        for key, label in (("fisher_mean", "Fisher, mean"), ("task_vector_mean_square", "task vector,\nmean square"))
        if any((row.get(key) or 0) > 0 for row in rows)
    ]
    if not shown:
        return None
    figure, axes = stacked(WIDTH, 1.35 * len(shown), len(shown))
    for axis, (key, label) in zip(axes, shown, strict=True):
        experts = experts_of(rows)[: 1 if key == "fisher_mean" else None]  # the base's, whatever the fine-tuned model
        for number, expert in enumerate(experts):
            own = [row for row in rows if row.get("expert") == expert]
            blocks, values = [row["block"] for row in own], [row.get(key) or math.nan for row in own]
            axis.plot(blocks, values, **style(number, len({*blocks}) == len(blocks)), label=f"model {number + 1}")
        over_blocks(axis, label)
        _log_scale(axis)
        if len(experts) > 1:
            axis.legend(fontsize=8)
        if axis is not axes[-1]:
            axis.tick_params(labelbottom=False)
    axes[-1].set_xlabel("decoder block")
    return figure


def _log_scale(axis: Any) -> None:
    """A log scale with a few ticks: within a decade matplotlib would label all of 2, 3, 4, ..., one over another."""
    from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    if decades < 1:
        for count in range(3, 9):
            ticks = [tick for tick in MaxNLocator(count).tick_values(low, high) if low <= tick <= high]
            if len(ticks) > 1:
                break
        axis.yaxis.set_major_locator(FixedLocator(ticks))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if decades < 2.5 else (1.0,), numticks=4))
    axis.yaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", labelsize=8)


def strip_panel(
    found: Sequence[Strip], told: Callable[[float], str], limits: tuple[float, float], line: float | None = None
) -> Any:
    """A narrow panel for each kind of tensor, all on one scale.

    Of several tensors of a kind in a block, such as those of experts, the mean is marked and a line leads from the
    least to the greatest.

    Args:
        told: a value in words.
        limits: of the scale, which says these two.
        line: a value to compare with.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    below, each = 0.45, 0.52  # inches
    height = each * len(found) + below
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(len(found), sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.13, right=0.98, bottom=below / height, top=1 - 0.2 / height, hspace=0.85)
    for axis, strip in zip(axes, found, strict=True):
        for number, model in enumerate(strip.models):
            _strip(axis, model, number)
        if line is not None:
            axis.axhline(line, color="0.4", linewidth=1, linestyle=":")
        name = drawable(strip.kind)
        name = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
        axis.set_title(name, loc="left", fontsize=9, pad=2, parse_math=False)
        axis.set_title(spread(strip.values, told), loc="right", fontsize=9, pad=2)
        axis.grid(axis="x", color="0.85")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    room = 0.12 * (limits[1] - limits[0])  # or a marker would touch the name above
    axes[0].set_ylim(limits[0] - room, limits[1] + room)
    axes[0].set_yticks(limits, [told(limit) for limit in limits])
    axes[-1].set_xlabel("decoder block", fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _strip(axis: Any, model: Numbers, number: int) -> None:
    blocks = sorted(model)
    means = [math.fsum(model[block]) / len(model[block]) for block in blocks]
    axis.plot(blocks, means, **{**style(number), "markersize": 3})
    for block in blocks:
        if len(model[block]) > 1:
            axis.plot([block, block], [min(model[block]), max(model[block])], color="black", linewidth=1)


def spread(values: Sequence[float], told: Callable[[float], str]) -> str:
    """The least and the greatest of some values in words; one where they read the same."""
    low, high = told(min(values)), told(max(values))
    return low if low == high else f"{low} to {high}"


def phase_panel(phases: Sequence[Phase]) -> Any:
    """Seconds and, where known, peak memory of each phase, as bars with their numbers."""
    known = all(phase.peak_bytes is not None for phase in phases)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.32 * len(phases) + 0.6), layout="constrained")
    axes = figure.subplots(1, 1 + known, sharey=True, squeeze=False)[0]
    names = [phase.name for phase in phases]
    _bars(axes[0], names, [phase.seconds for phase in phases], "seconds", ".1f", "")
    if known:
        _bars(axes[1], names, [(phase.peak_bytes or 0) / 2**20 for phase in phases], "peak memory, MiB", ".0f", "////")
    axes[0].invert_yaxis()
    return figure


def _bars(axis: Any, names: Sequence[str], values: Sequence[float], label: str, form: str, hatch: str) -> None:
    drawn = axis.barh(names, values, color="0.85", edgecolor="black", linewidth=1, hatch=hatch, height=0.6)
    axis.bar_label(drawn, [format(value, form) for value in values], padding=3, fontsize=8)
    axis.set_xlim(0, 1.3 * max(values) or 1)
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", nbins=4)
    axis.spines[["top", "right"]].set_visible(False)
