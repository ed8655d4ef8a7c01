"""What a merge did: the manifest, the tables for the terminal, the model card."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge._version import __version__
from streammerge.checkpoints import disk
from streammerge.checkpoints.layout import file_names
from streammerge.checkpoints.output import transfer_errors
from streammerge.fisher.store import FisherRecord
from streammerge.hub.destination import destination_text, notes_of
from streammerge.methods.api import Method
from streammerge.plan import MergePlan
from streammerge.units import format_memory, format_size

Row = list[str]


def resolved_recipe(plan: MergePlan) -> dict[str, Any]:
    """The recipe with every default filled in; as plain values, so that it can be run again."""
    values = plan.recipe.model_dump()
    values["parameters"] = plan.resolved.parameters
    for model, parameters in zip(values["models"], plan.resolved.experts, strict=True):
        model["parameters"] = parameters
    return values


def at_commit(reference: str, source: Mapping[str, Any]) -> str:
    """A model as the recipe names it, at the commit it was read from if it is on the Hub."""
    return f"{reference.partition('@')[0]}@{source['revision']}" if source.get("revision") else reference


def manifest(
    plan: MergePlan,
    method: Method,
    sources: Sequence[Mapping[str, Any]],
    entries: Mapping[str, Mapping[str, Any]],
    shards: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `streammerge.json`."""
    return {
        "version": __version__,
        "recipe": resolved_recipe(plan),
        "sources": [dict(source) for source in sources],
        "notes": plan.notes,
        "blocks": method.block_table(),
        "tensors": {name: dict(entry) for name, entry in entries.items()},
        "shards": {file: {"bytes": shards[file]["bytes"], "sha256": shards[file]["sha256"]} for file in sorted(shards)},
        "files": file_names(plan.shards),
    }


def file_entry(content: bytes | Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and its SHA-256.

    Raises:
        TransferError: it cannot be read.
    """
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest, size = hashlib.sha256(), 0
    with transfer_errors(f"file {content}", "cannot be read"):
        file = disk.open_to_read(content)
        try:
            while piece := disk.read_at(file, disk.PIECE, size):
                digest.update(piece)
                size += len(piece)
        finally:
            disk.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


_SEAL = re.compile(rb'(?<=\n  "sha256": ")[0-9a-f]{64}(?="\n}\n\Z)')  # at the end of a manifest's text


def seal(result: dict[str, Any]) -> bytes:
    """Give the manifest its last key, the SHA-256 of all other bytes of its text; the text."""
    text = json.dumps({**result, "sha256": 64 * "0"}, indent=2, allow_nan=False).encode() + b"\n"
    result["sha256"] = seal_of(text)
    return _SEAL.sub(result["sha256"].encode(), text)


def seal_of(text: bytes) -> str:
    """The SHA-256 of a manifest's text without the 64 digits of its seal."""
    return hashlib.sha256(_SEAL.sub(b"", text)).hexdigest()


def block_rows(result: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows of the per-block table: Fisher, task vector, score, alpha, fraction kept, rescaled.

    Of methods whose blocks have no score, the coefficient alpha alone, and what of it was kept where it was trimmed.
    """
    scored = any("score" in entry for entry in result["blocks"])
    header = ["block", "Fisher mean", "task vector^2", "score", "alpha", "kept", "rescaled"]
    rows = []
    for entry in result["blocks"]:
        tensors = _tensors_of(entry, result)
        kept, total = _kept(entry, tensors, result)
        rescaled = sum(1 for tensor in tensors if tensor.get("rescaled"))
        label = str(entry["block"]) + (f" {entry['tensor']}" if "tensor" in entry else "")
        rows.append(
            [
                f"{entry['expert']}: {label}" if "expert" in entry else label,
                _number(entry.get("fisher_mean"), ".3e"),
                _number(entry.get("task_vector_mean_square"), ".3e"),
                _number(entry.get("score"), ".3f"),
                _number(entry["alpha"], ".4f"),
                f"{100 * kept / total:.1f}%" if total else "-",
                f"{rescaled} of {len(tensors)}",
            ]
        )
    shown = range(7) if scored else (0, 4, 5) if any(row[5] != "-" for row in rows) else (0, 4)
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows]


def fisher_rows(record: FisherRecord) -> tuple[Row, list[Row]]:
    """Header and rows of the per-block table of a Fisher, with a bar of the mean on a log scale."""
    header = ["block", "mean", "max", "share", "log scale"]
    logs = [math.log(block.mean) if block.mean > 0 else -math.inf for block in record.blocks]
    finite = [value for value in logs if value > -math.inf]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    rows = []
    for block, value in zip(record.blocks, logs, strict=True):
        filled = 0 if value == -math.inf else 1 + round(19 * (value - low) / span) if span else 20
        bar = ("#" * filled).ljust(20)
        rows.append([str(block.block), f"{block.mean:.3e}", f"{block.max:.3e}", f"{100 * block.share:.1f}%", bar])
    return header, rows


def _tensors_of(entry: Mapping[str, Any], result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The manifest's entries of the matrices in a row of the block table."""
    named = result["tensors"].items()
    if "tensor" in entry:
        return [tensor for name, tensor in named if name == entry["tensor"]]
    return [t for _, t in named if t.get("block") == entry["block"] and len(t["shape"]) > 1]


def _kept(entry: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> tuple[int, int]:
    """Elements kept by the trim and elements in all, of one expert."""
    experts = [model["model"] for model in result["recipe"]["models"]]
    index = experts.index(entry["expert"]) if "expert" in entry else 0
    trimmed = [tensor for tensor in tensors if "kept" in tensor]
    counts = [t["kept"][index] if isinstance(t["kept"], list) else t["kept"] for t in trimmed]
    return sum(counts), sum(tensor["numel"] for tensor in trimmed)


def table(header: Row, rows: Sequence[Row]) -> str:
    """Columns padded to width for a terminal, the first to the left and the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        padded = [first.strip().ljust(widths[0]), *others]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plan_text(summary: Mapping[str, Any]) -> str:
    """What `streammerge plan` prints."""
    fisher = summary["fisher"]
    rows = [
        ("base", summary["base"]),
        *(("model", _with_parameters(model)) for model in summary["models"]),
        ("method", f"{summary['method']} ({_pairs(summary['parameters_of_method'])}){_post_step(summary)}"),
        ("Fisher", fisher),
        *([("calibration", _calibration(summary["calibration"]))] if summary["calibration"] else []),
        ("tensors", f"{summary['tensors']} ({summary['merged']} merged, {summary['copied']} copied from the base)"),
        ("parameters", f"{summary['parameters']:,}"),
        ("to read", _to_read(summary)),
        *([("from the Hub", _from_hub(summary["from_hub"]))] if summary["from_hub"] else []),
        ("to write", f"{format_size(summary['bytes_to_write'])} in {summary['shards']} shard(s)"),
        ("passes", f"at most {summary['passes']} over a tensor"),
        ("workers", str(summary["workers"])),
        (
            "host memory",
            f"{format_memory(summary['peak_host_bytes'])} at the peak, "
            f"{format_memory(summary['peak_merge_bytes'])} for the merge alone" + _available(summary),
        ),
        *(("disk", disk["text"] + _short(disk)) for disk in summary.get("disks", ())),
    ]
    if transfers := summary["transfers"]:
        rows.append(("transfers", _transfers(transfers)))
    if push := summary.get("push"):
        rows.append(("push", destination_text(push)))
    if fisher_pass := summary["fisher_placement"]:
        rows.append(("Fisher pass", _placement(fisher_pass)))
    lines = [f"{key:14} {value}" for key, value in rows]
    notes = [*summary["notes"], *(notes_of(push) if push else ())]
    return "\n".join(lines + [f"note           {note}" for note in notes])


def _transfers(transfers: Mapping[str, Any]) -> str:
    if transfers["by"] == "xet":
        return f"by Xet, with {format_memory(transfers['xet_bytes'])} of --max-ram"
    return f"by plain HTTP; by Xet, where it is installed, with --max-ram {transfers['ram_for_xet'] >> 20}MiB or more"


def _available(summary: Mapping[str, Any]) -> str:
    available = summary.get("available_host_bytes")
    told = "" if available is None else f"; {format_memory(available)} are available"
    return told + (": MORE THAN THERE CAN BE" if _is_too_large(summary) else "")


def _is_too_large(summary: Mapping[str, Any]) -> bool:
    most = summary.get("most_host_bytes")
    return most is not None and bool(summary["peak_host_bytes"] > most)


def _short(disk: Mapping[str, Any]) -> str:
    return "" if _suffices(disk) else ": NOT ENOUGH"


def _suffices(disk: Mapping[str, Any]) -> bool:
    return disk["free"] is None or bool(disk["needed"] <= disk["free"])


def is_short(summary: Mapping[str, Any]) -> bool:
    """Whether a merge would be refused for want of memory or disk."""
    return _is_too_large(summary) or not all(map(_suffices, summary.get("disks", ())))


_NAMED = 10  # tensors, of many


def verified_text(result: Mapping[str, Any], folder: str) -> str:
    """What `streammerge verify` prints."""
    lines = [f"note: {note}" for note in result["notes"]]
    if names := result["nonfinite"]:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"note: {len(names)} tensor(s) hold NaN or Inf: {', '.join(names[:_NAMED])}{more}")
    lines += [f"{folder}: {problem}" for problem in result["problems"]]
    if result["ok"]:
        size = format_size(result["bytes"])
        lines.append(f"{folder}: ok: {result['tensors']} tensors, {size}, every file as it was written")
    if sources := result.get("sources"):
        lines += [f"note: {note}" for note in sources["notes"]]
        count, differing = len(sources["tensors"]), len(sources["differing"])
        came = ", their coefficients taken from the manifest" if sources["coefficients"] == "recorded" else ""
        verdict = f"{differing} of them differ" if differing else "identical"
        lines.append(f"{folder}: {count} tensors merged again from the sources{came}: {verdict}")
    return "\n".join(lines)


def _placement(fisher: Mapping[str, Any]) -> str:
    streamed = fisher["blocks"] - fisher["stay"]
    text = f"on {fisher['device']}, {fisher['stay']} of {fisher['blocks']} blocks stay, {streamed} are read twice; "
    peak = fisher["device_bytes"]
    return (
        text + (f"{format_memory(peak)} there and " if peak else "") + f"{format_memory(fisher['host_bytes'])} of RAM"
    )


def _to_read(summary: Mapping[str, Any]) -> str:
    text = f"{format_size(summary['bytes_to_read'])} at most"
    for what, size in (
        ("Fisher", summary["fisher_bytes_to_read"]),
        ("calibration", summary["calibration_bytes_to_read"]),
    ):
        text += f", and {format_size(size)} for the {what}" if size else ""
    return text


def _from_hub(travel: Mapping[str, Any]) -> str:
    streamed = {key: travel[key] for key in ("fisher", "calibration", "survey", "merge") if travel[key]}
    text = format_size(travel["total"]) + (" at most" if travel["at_most"] and streamed else "")
    parts = [f"{format_size(count)} for the {'Fisher' if key == 'fisher' else key}" for key, count in streamed.items()]
    if travel["downloads"]:
        parts.insert(0, f"{format_size(travel['downloads'])} into its cache")
    if streamed:
        often = sum(streamed.values()) / travel["size"]
        parts.append(f"which is every weight {often:.1f} times on average")
    parts.append(f"{format_size(travel['opened'])} have come for this plan")
    return f"{text}: {', '.join(parts)}"


def _post_step(summary: Mapping[str, Any]) -> str:
    return "" if summary["aim"] is None else f", then AIM (omega {summary['aim']})"


def _calibration(cost: Mapping[str, Any]) -> str:
    what = ", ".join(name.replace("_", " ") for name in cost["measurements"])
    return f"{what} on {cost['tokens']} tokens per text, {format_memory(cost['host_bytes'])} of RAM"


def _with_parameters(model: Mapping[str, Any]) -> str:
    values = {key: value for key, value in model.items() if key != "model"}
    return f"{model['model']} ({_pairs(values)})" if values else str(model["model"])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "no parameters"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isinf(value) else format(value, form)
