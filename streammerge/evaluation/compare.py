"""Several models side by side: the papers' table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from streammerge._version import __version__
from streammerge.checkpoints.identity import differences
from streammerge.errors import RecipeError
from streammerge.evaluation.run import BATCH_SIZE, Evaluation, How, Record, load_all
from streammerge.evaluation.scores import averages
from streammerge.evaluation.settings import TASKS, EvaluationSettings
from streammerge.evaluation.store import COMPARISON, check_folder, read_results, write_files
from streammerge.evaluation.text import comparison_markdown
from streammerge.names import Named, named
from streammerge.schema import build
from streammerge.text import all_visible


def compare(
    models: Sequence[Named],
    settings: EvaluationSettings | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    batch_size: int = BATCH_SIZE,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Hold models side by side, from results that are there or by evaluating.

    Args:
        models: folders of results, as `evaluate` writes them with `out`; or models, which are evaluated now.
        settings: of those that are evaluated; `tasks` also chooses which tasks are shown. Without it they are those of
            the folders of results, and where there is no such folder the papers' six.
        out: folder for compare.json and compare.md; every model that is evaluated gets a folder in it.
        device, batch_size, trust_remote_code, overwrite, progress: as for `evaluate`.

    Returns:
        Plain values: version, `tasks` (names), by task `problems` (where they are from, how many `rows` there are) and
        `settings` (how responses were drawn), and `models`: a mapping each of name, model (id and revision), `tasks`
        (name -> scores) and `average`, which is None where a task is missing.

    Raises:
        RecipeError: fewer than two models, or one twice; results of different problems or settings, all differences;
            no tasks are named, a model is to be evaluated, and the folders of results hold different ones.
        OutputExistsError, CheckpointError, TransferError: as for `evaluate`.
    """
    if isinstance(models, str | os.PathLike):
        raise RecipeError(f"--compare: give a list of models, or of folders of results, not {models} alone")
    given = [named(model) for model in models]
    names = _names(given)
    if not isinstance(settings, EvaluationSettings):
        settings = build(EvaluationSettings, settings or {}, "evaluation")
    settings.check()
    how = How(device, batch_size, trust_remote_code, overwrite, progress)
    saved = {model: read_results(Path(model)) for model in given}
    fresh = [model for model in given if not saved[model]]
    if out is not None:
        check_folder(Path(out))
    if fresh:
        how.check()
        settings = _with_tasks(settings, saved)
    problems = load_all(settings) if fresh else {}
    with ExitStack() as stack:
        evaluations = {}
        for model in fresh:
            folder = None if out is None else Path(out) / names[model]
            evaluations[model] = stack.enter_context(Evaluation(model, settings, problems, how, folder))
        shown = _shown(settings, saved, bool(fresh))
        identities = {
            names[model]: evaluations[model].identities
            if model in evaluations
            else {task: record["identity"] for task, record in saved[model].items()}
            for model in given
        }
        _require_alike(identities, shown)
        records = {names[model]: evaluations[model].run() if model in evaluations else saved[model] for model in given}
    measured = {task: record for task in shown for of in records.values() if (record := of.get(task)) is not None}
    if not measured:
        raise RecipeError(f"--compare: no folder holds a result of {' or '.join(shown)}")
    result = {
        "version": __version__,
        "tasks": shown,
        "problems": {task: record["problems"] for task, record in measured.items()},
        "settings": {task: record["identity"]["settings"] for task, record in measured.items()},
        "models": [_row(name, of, shown) for name, of in records.items()],
    }
    if out is not None:
        texts = {"json": json.dumps(result, indent=2) + "\n", "md": comparison_markdown(all_visible(result))}
        write_files(Path(out), {f"{COMPARISON}.{end}": text for end, text in texts.items()})
    return result


def _names(models: Sequence[str]) -> dict[str, str]:
    """What each is called: the last part of its name, more of it where two share that."""
    if len(models) < 2:
        raise RecipeError("--compare: give at least two models, or folders of results")
    if len(set(models)) < len(models):
        raise RecipeError(f"--compare: {next(name for name in models if models.count(name) > 1)} is given twice")
    parts = {model: [part for part in model.rstrip("/").split("/") if part not in ("", ".", "..")] for model in models}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {model: "-".join(parts[model][-count:]) or "model" for model in models}
        if len(set(names.values())) == len(models):
            return names
    return {model: f"model-{number}" for number, model in enumerate(models, 1)}


def _with_tasks(settings: EvaluationSettings, saved: Mapping[str, Mapping[str, Record]]) -> EvaluationSettings:
    """What the other models are evaluated on where no tasks are named: on what the results there are about."""
    held = {folder: [task for task in TASKS if task in results] for folder, results in saved.items() if results}
    if not held or "tasks" in settings.model_fields_set:
        return settings
    (first, tasks), *others = held.items()
    for folder, found in others:
        if found != tasks:
            raise RecipeError(
                f"--compare: {first} holds {', '.join(tasks)}, {folder} {', '.join(found)}: give --tasks to say on "
                "which the other models are evaluated"
            )
    return settings.model_copy(update={"tasks": tuple(tasks)})


def _shown(settings: EvaluationSettings, saved: Mapping[str, Mapping[str, Record]], any_fresh: bool) -> list[str]:
    """The tasks asked for; where none is and all results are there, those that any of them has."""
    if any_fresh or "tasks" in settings.model_fields_set:
        return list(settings.tasks)
    return [task for task in TASKS if any(task in results for results in saved.values())]


def _require_alike(identities: Mapping[str, Mapping[str, Record]], shown: Sequence[str]) -> None:
    """Refuse to put side by side what was measured differently."""
    found = []
    for task in shown:
        (first, expected), *others = [(name, of[task]) for name, of in identities.items() if task in of] or [("", {})]
        for name, identity in others:
            apart = differences(expected, {**identity, "model": expected["model"]})
            found += [f"{task} of {first} and {name}: {difference}" for difference in apart]
    if found:
        raise RecipeError(f"--compare: not measured alike: {'; '.join(found)}")


def _row(name: str, records: Mapping[str, Record], shown: Sequence[str]) -> dict[str, Any]:
    model = next(iter(records.values()))["identity"]["model"]
    tasks = {task: records[task]["scores"] for task in shown if task in records}
    return {
        "name": name,
        "model": {"id": model["id"], "revision": model["revision"]},
        "tasks": tasks,
        "average": averages(tasks.values()) if len(tasks) == len(shown) else None,
    }
