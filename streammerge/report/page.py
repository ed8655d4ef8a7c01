"""`report.html`: one page on what a merge did, for a person. It stays beside the manifest and is no part of it.

It says how long things took and how much memory that was, which no two runs have in common; so the manifest does not
name it, `verify` does not look at it, and no push takes it along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from streammerge.checkpoints.output import REPORT_MARK
from streammerge.figures import inline, quiet
from streammerge.methods import METHODS
from streammerge.report import block_rows
from streammerge.report.markup import details, document, escaped, figure, figures, paragraph, section, table
from streammerge.report.panels import (
    MOST_KINDS,
    Strip,
    coefficient_panel,
    experts_of,
    phase_panel,
    size_panel,
    spread,
    strip_panel,
    strips,
)
from streammerge.timeline import Phase
from streammerge.units import format_memory, format_size

MOST_TENSORS = 1000  # rows of the table; a model of many experts has tens of thousands
MOST_ROWS = 40  # of a table that is shown unasked


def report_page(result: Mapping[str, Any], phases: Sequence[Phase], *, complete_before: int = 0) -> bytes:
    """The page; needs matplotlib.

    Args:
        result: the manifest.
        phases: of this run.
        complete_before: how many tensors earlier runs, which were interrupted, had merged already.
    """
    base, *experts = [source["id"] for source in result["sources"] if source["role"] != "fisher"]
    title = f"Merge of {' and '.join(experts)} into {base}"
    with quiet():
        body = [
            f"<main>\n<h1>{escaped(title)}</h1>",
            _summary(result),
            _notes(result),
            _blocks(result),
            _tensors(result),
            _run(phases, complete_before, len(result["tensors"])),
            _recipe(result),
            _files(result),
            "</main>",
        ]
        return REPORT_MARK + document(title, list(filter(None, body)))


def _summary(result: Mapping[str, Any]) -> str:
    name = result["recipe"]["method"]
    merged = sum("coefficient" in tensor for tensor in result["tensors"].values())
    size = format_size(sum(shard["bytes"] for shard in result["shards"].values()))
    aim = result["recipe"].get("aim")
    text = (
        f"Method {name}{'' if aim is None else f', then AIM (omega {aim})'}: {METHODS[name].summary} "
        f"({METHODS[name].reference}). {merged} tensors merged, {len(result['tensors']) - merged} copied from the "
        f"base, {size} in {len(result['shards'])} file(s). By streammerge {result['version']}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    )
    return f"<p>{escaped(text)}</p>"


def _notes(result: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in result["notes"])
    return section("Notes", f"<ul>{items}</ul>") if items else ""


def _blocks(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["blocks"] if row.get("alpha") is not None]
    if not rows:
        return section("Blocks", paragraph("This method gives the decoder blocks no coefficients of their own."))
    drawn = [
        figure(
            inline(coefficient_panel(rows), "alpha", escaped(_told_alphas(rows))),
            f"Merge coefficient alpha of each decoder block. {_who(rows)}",
        )
    ]
    if (sizes := size_panel(rows)) is not None:
        alt = "Mean Fisher and mean square of the task vector of each decoder block; the numbers are in the table below"
        caption = (
            "Fisher of the base and size of the task vector, means over a block's matrices or of each, on log scales."
        )
        drawn.append(figure(inline(sizes, "sizes", alt), caption))
    return section("Blocks", figures(drawn), _block_table(result))


def _block_table(result: Mapping[str, Any]) -> str:
    header, rows = block_rows(result)
    for number, expert in enumerate(experts_of(result["blocks"]), 1):
        if expert is not None:
            rows = [[row[0].replace(f"{expert}: ", f"model {number}: ", 1), *row[1:]] for row in rows]
    listed = table("Decoder blocks", header, rows)
    return listed if len(rows) <= MOST_ROWS else details("Table of the blocks", listed)


def _who(rows: Sequence[Mapping[str, Any]]) -> str:
    experts = experts_of(rows)
    if len(experts) == 1:
        return ""
    return "; ".join(f"model {number}: {expert}" for number, expert in enumerate(experts, 1)) + "."


def _told_alphas(rows: Sequence[Mapping[str, Any]]) -> str:
    low, high = (pick(rows, key=lambda row: row["alpha"]) for pick in (min, max))
    return (
        f"Merge coefficient of {len({row['block'] for row in rows})} decoder blocks: from {low['alpha']:.3f} at block "
        f"{low['block']} to {high['alpha']:.3f} at block {high['block']}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _plain(number: float) -> str:
    return f"{number:.4g}"


def _tensors(result: Mapping[str, Any]) -> str:
    drawn = []
    kept, ratios, coefficients = (strips(result, key) for key in ("kept", "norm_ratio", "coefficient"))
    if kept:
        told = "Fraction of the task vector that is kept, per tensor."
        drawn.append(_strips(kept, "kept", told, _percent, (0.0, max(1.0, *_values(kept)))))
    if ratios:
        told = "Norm of the merged tensor's outputs over the base's, before it is rescaled; dotted: unchanged."
        drawn.append(_strips(ratios, "norms", told, lambda ratio: f"{ratio:.3f}", _around(ratios, 1.0), 1.0))
    of_tensors = not result["blocks"] or any("tensor" in row for row in result["blocks"])
    if coefficients and of_tensors and len({*_values(coefficients)}) > 1:
        told = "Merge coefficient per tensor."
        drawn.append(_strips(coefficients, "coefficients", told, _plain, _around(coefficients)))
    rows = [_tensor_row(name, entry) for name, entry in list(result["tensors"].items())[:MOST_TENSORS]]
    left = len(result["tensors"]) - len(rows)
    more = f", the first {len(rows)}; the other {left} are in streammerge.json" if left else ""
    header = ["tensor", "dtype", "shape", "coefficient", "kept", "norm ratio", "rescaled"]
    used = [column for column in range(len(header)) if column < 3 or any(row[column] != "-" for row in rows)]
    listed = table(f"Tensors{more}", [header[i] for i in used], [[row[i] for i in used] for row in rows], words=True)
    several = max((len(strip.models) for strip in [*kept, *coefficients]), default=1) > 1
    outside = sum(tensor.get("block") is None for tensor in result["tensors"].values())
    told = "Models are told apart by their markers and dashes, in the order of the recipe. " if several else ""
    told += (
        f"Tensors outside of the decoder blocks, {outside} of them, are in the table only." if drawn and outside else ""
    )
    return section("Tensors", figures(drawn), paragraph(told) if told else "", details("Table of the tensors", listed))


def _strips(
    found: Sequence[Strip],
    name: str,
    caption: str,
    told: Callable[[float], str],
    limits: tuple[float, float],
    line: float | None = None,
) -> str:
    shown = found[:MOST_KINDS]
    if len(found) > len(shown):
        caption += f" The first {len(shown)} kinds of tensor of {len(found)}; all are in streammerge.json."
    alt = caption + " " + "; ".join(f"{strip.kind} {spread(strip.values, told)}" for strip in shown)
    return figure(inline(strip_panel(shown, told, limits, line), name, escaped(alt)), caption)


def _values(found: Sequence[Strip]) -> list[float]:
    return [value for strip in found for value in strip.values]


def _around(found: Sequence[Strip], *lines: float) -> tuple[float, float]:
    """Limits of a scale with all values and the lines in it."""
    values = [*lines, *_values(found)]
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.01, high + 0.01)


def _tensor_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    numel = max(entry["numel"], 1)
    return [
        name,
        entry["dtype"],
        " x ".join(map(str, entry["shape"])) or "scalar",
        _cell(entry.get("coefficient"), _plain),
        _cell(entry.get("kept"), lambda kept: _percent(kept / numel)),
        _cell(entry.get("norm_ratio"), lambda ratio: f"{ratio:.4f}"),
        "-" if "rescaled" not in entry else "yes" if entry["rescaled"] else "no",
    ]


def _cell(value: Any, told: Callable[[float], str]) -> str:
    """One number, or those of the models one after another."""
    values = value if isinstance(value, list) else [value]
    return ", ".join("-" if number is None else told(number) for number in values)


def _run(phases: Sequence[Phase], complete_before: int, tensors: int) -> str:
    if not phases:
        return ""
    total = sum(phase.seconds for phase in phases)
    rows = [
        [phase.name, f"{phase.seconds:.2f}", "-" if phase.peak_bytes is None else format_memory(phase.peak_bytes)]
        for phase in phases
    ]
    before = (
        f"An earlier run was interrupted: it had merged {complete_before} of the {tensors} tensors already, and its "
        "time is not counted."
        if complete_before
        else ""
    )
    alt = f"{len(phases)} phases, {total:.1f} seconds in all; the numbers are in the table"
    caption = "Time of each phase, and the most memory that the process had in it: libraries and mapped files too."
    drawn = figure(inline(phase_panel(phases), "phases", alt), caption)
    listed = table(f"Phases, {total:.1f} seconds in all", ["phase", "seconds", "peak memory"], rows)
    return section("Time and memory", paragraph(before) if before else "", figures([drawn, listed]))


def _recipe(result: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(result["recipe"], sort_keys=False, allow_unicode=True)
    lines = "\n".join(map(escaped, text.split("\n")))
    sources = [
        [source["role"], source["id"], source["revision"] or "local folder", source["fingerprint"]]
        for source in result["sources"]
    ]
    return section(
        "Recipe and sources",
        table("Sources", ["role", "model", "revision", "fingerprint"], sources, words=True, wraps=True),
        f"<pre>{lines.strip()}</pre>",
    )


def _files(result: Mapping[str, Any]) -> str:
    rows = [[name, format_size(entry["bytes"]), entry["sha256"]] for name, entry in result["shards"].items()]
    return section("Shards", table("Weights", ["file", "size", "SHA-256"], rows, words=True))
