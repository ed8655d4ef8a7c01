"""What a sweep found: its Pareto front, table, Markdown page and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.figures import drawable, picture, quiet, stacked
from streammerge.report import table
from streammerge.sweep.grid import told
from streammerge.text import visible

PLOT_ALT = "Accuracy over mean length of the points, the Pareto front joined"


def pareto_front(scores: Sequence[tuple[float, float]]) -> list[bool]:
    """Which pairs of accuracy and length no other beats: at least as accurate and as short, and better in one.

    Pairs that are equal are on the front together.
    """
    return [
        not any(
            accuracy >= own_accuracy and length <= own_length and (accuracy > own_accuracy or length < own_length)
            for accuracy, length in scores
        )
        for own_accuracy, own_length in scores
    ]


def sweep_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of points; a star is on the front."""
    keys = list(result["grid"])
    header = ["#", *keys, "accuracy", "length", "truncated", "front"]
    rows = [
        [
            str(number),
            *(told(point["settings"][key]) if key in point["settings"] else "-" for key in keys),
            f"{100 * point['scores']['accuracy']:.1f}%",
            f"{point['scores']['mean_length']:.1f}",
            _share(point["scores"].get("truncated")),
            "*" if point["front"] else "",
        ]
        for number, point in enumerate(result["points"], 1)
    ]
    return header, rows


def _share(value: Any) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, (int, float)) else "-"


def front_lines(result: Mapping[str, Any]) -> list[str]:
    """The front in words, the shortest answers first."""
    numbered = [(number, point) for number, point in enumerate(result["points"], 1) if point["front"]]
    lines = []
    for number, point in sorted(numbered, key=lambda pair: pair[1]["scores"]["mean_length"]):
        scores = point["scores"]
        own = ", ".join(f"{key} {told(value)}" for key, value in point["settings"].items()) or "the recipe as it is"
        lines.append(f"#{number}: {100 * scores['accuracy']:.1f}% in {scores['mean_length']:.1f} tokens: {own}")
    return lines


def sweep_text(result: Mapping[str, Any]) -> str:
    """What `streammerge sweep` prints."""
    lines = [table(*sweep_rows(result)), "", "Pareto front of accuracy and mean length, shortest first:"]
    return "\n".join([*lines, *front_lines(result), *(f"note: {note}" for note in result["notes"])])


def sweep_markdown(result: Mapping[str, Any], plot: str | None) -> str:
    """The page; `plot` names the picture beside it."""
    header, rows = sweep_rows(result)
    base, *models = [_plain(source["id"]) for source in result["sources"]]
    asked = result["points"][0]["scores"].get("problems", result["limit"])  # there may be fewer than the limit
    limit = "" if result["limit"] is None else f", the first {asked} problems"
    lines = [
        f"# Sweep: {' and '.join(models)} into {base}",
        f"By streammerge {result['version']}, evaluation {_plain(result['evaluation'])}{limit}; a star is on the "
        "Pareto front of accuracy and mean length (tokens).",
        "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in (header, ["---"] * len(header), *rows)),
        f"![{PLOT_ALT}]({plot})" if plot else "",
        "## Pareto front, shortest first",
        "\n".join(f"- {_plain(line)}" for line in front_lines(result)),
        "## Notes\n\n" + "\n".join(f"- {_plain(note)}" for note in result["notes"]) if result["notes"] else "",
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def _plain(text: str) -> str:
    """Text that cannot break out of a Markdown line or cell, nor become a link or an element."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in visible(text)) if text.strip("-*") else text


def sweep_plot(result: Mapping[str, Any]) -> bytes:
    """A PNG: accuracy over length, each point with its number in the table; the front is filled and joined."""
    with quiet():
        figure, (axis,) = stacked(7, 4.5, 1)
        places = [(point["scores"]["mean_length"], 100 * point["scores"]["accuracy"]) for point in result["points"]]
        on = [point["front"] for point in result["points"]]
        front = sorted(place for place, best in zip(places, on, strict=True) if best)
        joined = {"color": "black", "linewidth": 1, "linestyle": "--", "drawstyle": "steps-post", "zorder": 1.6}
        axis.plot(*zip(*front, strict=True), **joined)
        for best in (True, False):
            shown = [place for place, is_best in zip(places, on, strict=True) if is_best is best]
            if shown:
                filled = "black" if best else "white"
                axis.scatter(*zip(*shown, strict=True), marker="o", s=28, color=filled, edgecolor="black", zorder=2)
        paper = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # over the line, under dots
        for number, (place, best) in enumerate(zip(places, on, strict=True), 1):
            # Away from the front: it leaves a point to the right, and comes from below.
            away = {"xytext": (-4, 4), "ha": "right"} if best else {"xytext": (4, -4), "va": "top"}
            axis.annotate(str(number), place, textcoords="offset points", fontsize=8, bbox=paper, zorder=1.7, **away)
        axis.set(xlabel="mean length, tokens", ylabel=f"accuracy on {drawable(result['evaluation'])}, %")
        axis.margins(0.08)
        axis.grid(color="0.85")
        return picture(figure, "png")
