"""What `streammerge eval` prints, and the table of a comparison in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.report import Row, table

_UNITS = "accuracy and truncated in %, length in tokens of the model's own tokenizer"


def evaluation_text(result: Mapping[str, Any]) -> str:
    """A row for each task, and their unweighted averages in the last."""
    samples = result["settings"]["samples"]
    header = ["task", "accuracy", "+-", *(["one response"] if samples > 1 else []), "length", "truncated", "no answer"]
    rows = []
    for name, scores in result["tasks"].items():
        error = "-" if scores["stderr"] is None else f"{100 * scores['stderr']:.1f}"
        alone = [_percent(scores["sample_accuracy"])] if samples > 1 else []
        lengths = [f"{scores['mean_length']:.0f}", _percent(scores["truncated"]), _percent(scores["no_answer"])]
        rows.append([name, _percent(scores["accuracy"]), error, *alone, *lengths])
    average = result["average"]
    blank = [""] if samples > 1 else []
    rows.append(["average", _percent(average["accuracy"]), "", *blank, *_lengths(average), ""])
    how = f"; accuracy of the vote of {samples} responses, and of one" if samples > 1 else ""
    problems = ", ".join(f"{scores['problems']} of {name}" for name, scores in result["tasks"].items())
    return "\n".join([table(header, rows), "", f"problems: {problems}", f"{_UNITS}{how}"])


def comparison_text(result: Mapping[str, Any]) -> str:
    """The papers' table: a row for each model."""
    header, rows = _comparison(result)
    return "\n".join([table(header, rows), "", _UNITS, *_missing(result)])


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """The same in Markdown."""
    header, rows = _comparison(result)
    marks = ["---", *("---:" for _ in header[1:])]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, marks, *rows)]
    return "\n".join([*lines, "", f"{_UNITS[0].upper()}{_UNITS[1:]}.", *_missing(result), ""])


def _comparison(result: Mapping[str, Any]) -> tuple[Row, Sequence[Row]]:
    tasks = result["tasks"]
    rows = []
    for model in result["models"]:
        scores = [_percent(model["tasks"][task]["accuracy"]) if task in model["tasks"] else "-" for task in tasks]
        average = model["average"]
        means = ["-"] * 3 if average is None else [_percent(average["accuracy"]), *_lengths(average)]
        rows.append([model["name"], *scores, *means])
    return ["model", *tasks, "average", "length", "truncated"], rows


def _missing(result: Mapping[str, Any]) -> list[str]:
    lacking = [model["name"] for model in result["models"] if model["average"] is None]
    return [f"note: no averages of {', '.join(lacking)}: not all tasks are there"] if lacking else []


def _lengths(average: Mapping[str, float]) -> list[str]:
    return [f"{average['mean_length']:.0f}", _percent(average["truncated"])]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
