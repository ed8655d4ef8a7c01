"""What `streammerge eval` prints, and the table of a comparison in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.report import Row, table

_UNITS = "accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error"
_GREEDY = "greedy"


def evaluation_text(result: Mapping[str, Any]) -> str:
    """A row for each task, and their unweighted averages in the last."""
    samples = result["settings"]["samples"]
    header = ["task", "accuracy", "+-", *(["one response"] if samples > 1 else []), "length", "truncated", "no answer"]
    rows = []
    for name, scores in result["tasks"].items():
        alone = [_percent(scores["sample_accuracy"])] if samples > 1 else []
        rows.append(
            [
                name,
                _percent(scores["accuracy"]),
                _error(scores),
                *alone,
                *_lengths(scores),
                _percent(scores["no_answer"]),
            ]
        )
    average = result["average"]
    blank = [""] if samples > 1 else []
    rows.append(["average", _percent(average["accuracy"]), _error(average), *blank, *_lengths(average), ""])
    counts = {name: scores["problems"] for name, scores in result["tasks"].items()}
    drawn = _drawn(dict.fromkeys(counts, result["settings"]))
    return "\n".join([table(header, rows), "", _problems(counts, result["problems"]), *drawn, _UNITS])


def comparison_text(result: Mapping[str, Any]) -> str:
    """The papers' table: a row for each model."""
    header, rows = _comparison(result)
    return "\n".join([table(header, rows), "", *_notes(result)])


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """The same in Markdown."""
    header, rows = _comparison(result)
    marks = ["---", *("---:" for _ in header[1:])]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, marks, *rows)]
    return "\n".join([*lines, "", *(f"- {note[0].upper()}{note[1:]}." for note in _notes(result)), ""])


def _comparison(result: Mapping[str, Any]) -> tuple[Row, Sequence[Row]]:
    tasks = result["tasks"]
    rows = []
    for model in result["models"]:
        scores = [_with_error(model["tasks"][task]) if task in model["tasks"] else "-" for task in tasks]
        average = model["average"]
        means = ["-"] * 3 if average is None else [_with_error(average), *_lengths(average)]
        rows.append([model["name"], *scores, *means])
    return ["model", *tasks, "average", "length", "truncated"], rows


def _notes(result: Mapping[str, Any]) -> list[str]:
    """On how many problems the numbers are, how responses were drawn, in which units they are, and what is missing."""
    every = {task: scores["problems"] for model in result["models"] for task, scores in model["tasks"].items()}
    counts = {task: every[task] for task in result["tasks"] if task in every}
    lines = [_problems(counts, result["problems"]), *_drawn(result["settings"]), f"{_UNITS}"]
    lacking = [model["name"] for model in result["models"] if model["average"] is None]
    return [*lines, *([f"note: no averages of {', '.join(lacking)}: not all tasks are there"] if lacking else [])]


def _problems(counts: Mapping[str, int], sources: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of each task there are answers to, and whether they are those that the papers' numbers are about."""
    told = []
    for task, count in counts.items():
        rows = sources[task]["rows"]
        told.append(f"all {rows} of {task}" if count == rows else f"{count} of the {rows} of {task}")
    others = [task for task in counts if not sources[task]["papers_file"]]
    if len(others) == len(counts):
        which = "not the papers' files"
    else:
        which = "the papers' files" + (f" but for {', '.join(others)}" if others else "")
    return f"problems: {', '.join(told)}; {which}"


def _drawn(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How responses were drawn, where not all are greedy."""
    by_way: dict[str, list[str]] = {}
    for task, drawn in settings.items():
        by_way.setdefault(_way(drawn), []).append(task)
    if list(by_way) == [_GREEDY]:
        return []
    return ["responses: " + "; ".join(f"{way} ({', '.join(tasks)})" for way, tasks in by_way.items())]


def _way(drawn: Mapping[str, Any]) -> str:
    if drawn["temperature"] == 0:
        return _GREEDY
    count = drawn["samples"]
    voted = f"{count} to each problem, accuracy of their vote" if count > 1 else "one to each problem"
    return f"{voted}, at temperature {drawn['temperature']:g}, seed {drawn['seed']}"


def _with_error(scores: Mapping[str, Any]) -> str:
    accuracy = _percent(scores["accuracy"])
    return accuracy if scores["stderr"] is None else f"{accuracy} +- {_error(scores)}"


def _error(scores: Mapping[str, Any]) -> str:
    return "-" if scores["stderr"] is None else _percent(scores["stderr"])


def _lengths(scores: Mapping[str, float]) -> list[str]:
    length = scores["mean_length"]
    return [f"{length:.{0 if length >= 100 else 1}f}", _percent(scores["truncated"])]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
