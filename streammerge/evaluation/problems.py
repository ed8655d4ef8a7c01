"""The problems of a task, from a folder, the Hub or this package: read and checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

from streammerge.checkpoints import disk
from streammerge.errors import RecipeError, TransferError
from streammerge.evaluation.task_files import HubFile, TaskFile
from streammerge.hub.remote import Remote, Tally
from streammerge.hub.repository import FIRST_TRIES
from streammerge.hub.tries import PassingError, hub_errors, persist
from streammerge.mini_l2s.problems import scored_problems

_QUESTIONS = ("question", "problem")
_ANSWERS = ("final_answer", "answer", "solution")


@dataclass(frozen=True)
class Problems:
    """The problems of one task.

    Attributes:
        rows: a question and its right answer each, in the order of the file.
        source: where they are from: path, repository or generator, SHA-256, how many; whether it is the papers' file.
    """

    rows: list[dict[str, str]]
    source: dict[str, Any]


def load_problems(task: TaskFile, data: Path | None, limit: int | None) -> Problems:
    """Read the problems of a task.

    Args:
        task: the task.
        data: a folder with TASK.jsonl or TASK/test.jsonl; None: from the Hub, at the commit the task file names, or of
            mini_l2s the package's own held-out problems.
        limit: only the first so many; the others are checked all the same.

    Raises:
        RecipeError: no such file, an empty one, or a row that is no problem.
        CheckpointError: no access to the data set.
        TransferError: the Hub cannot be reached, or sends another file.
    """
    if data is not None:
        path = _find(task.name, data)
        name, place = str(path), {"file": str(path)}
    elif task.hub is not None:
        path = _download(task.hub)
        place = {"repository": task.hub.repository, "revision": task.hub.revision, "file": task.hub.name}
        name = f"data set {task.hub.repository}, file {task.hub.name}"
    else:
        own = _own_problems()
        return Problems(own.rows[:limit], own.source)
    try:
        raw = disk.read_file(path)
    except OSError as error:
        raise TransferError(f"{name}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(raw).hexdigest()
    known = task.hub is not None and task.hub.is_it(len(raw), digest)
    if data is None and not known:
        raise TransferError(f"{name}: not the file that the papers used ({len(raw)} bytes, SHA-256 {digest[:16]})")
    rows = _rows(raw, name)
    return Problems(rows[:limit], {**place, "sha256": digest, "rows": len(rows), "papers_file": known})


def problem(row: Any, where: str = "") -> dict[str, str]:
    """Question and right answer of a row as the papers' data sets have it.

    The answer is `final_answer[0]`, else `answer` (after its `####`, if there is one), else the last box of `solution`.
    Questions to be answered by true or false, yes or no, say so, as in the Qwen2.5-Math toolkit.

    Raises:
        RecipeError: a field is missing or empty.
    """
    if not isinstance(row, Mapping):
        raise RecipeError(f"{where}: not a mapping of fields")
    question = next((row[name] for name in _QUESTIONS if isinstance(row.get(name), str)), "").strip()
    answer = _answer(row)
    for names, found in ((_QUESTIONS, question), (_ANSWERS, answer)):
        if not found:
            has = ", ".join(sorted(map(str, row))) or "nothing"
            raise RecipeError(f"{where}: no text in field {' or '.join(map(repr, names))} (it has {has})")
    text = question + answer
    if text.encode("utf-8", "ignore").decode() != text:
        raise RecipeError(f"{where}: holds one half of a character (an unpaired surrogate)")
    for pair in (("true", "false"), ("yes", "no")):
        if answer.lower() in pair:
            question += f" ({pair[0].capitalize()} or {pair[1].capitalize()})"
    return {"question": question, "answer": answer}


def process_docs(dataset: Any) -> Any:
    """`problem` of every row, for lm-evaluation-harness's own command."""
    return dataset.map(problem, remove_columns=dataset.column_names)


def last_box(text: str) -> str | None:
    r"""What is in the last \boxed{} or \fbox{}, braces matched; up to the end where it is not closed.

    None where there is none.
    """
    start = max(text.rfind(command) + len(command) if command in text else -1 for command in ("\\boxed{", "\\fbox{"))
    if start < 0:
        return None
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _answer(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in _ANSWERS if row.get(name) is not None), None)
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return ""
    if row.get("final_answer") is None and row.get("answer") is None:
        value = last_box(value) or ""
    return value.rpartition("####")[2].strip()


def _rows(raw: bytes, name: str) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise RecipeError(f"{name}, line {number}: not valid JSON") from None
            rows.append(problem(row, f"{name}, line {number}"))
    if not rows:
        raise RecipeError(f"{name}: there is no problem in it")
    return rows


def _own_problems() -> Problems:
    """Those that `mini_l2s.score` asks, in their order."""
    rows = [{"question": asked.question, "answer": str(asked.answer)} for asked in scored_problems()]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    source = {"generator": scored_problems.__module__, "sha256": digest, "rows": len(rows), "papers_file": False}
    return Problems(rows, source)


def _find(task: str, data: Path) -> Path:
    names = (f"{task}.jsonl", f"{task}/test.jsonl")
    for path in (data / name for name in names):
        if path.is_file():
            return path
    raise RecipeError(f"--data {data}: task {task}: there is no {' and no '.join(names)}")


def _download(file: HubFile) -> Path:
    """The file in the Hub's cache, by the Hub's own client; the Hub is not asked for what is there."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = f"data set {file.repository}, file {file.name}"
    cached = try_to_load_from_cache(file.repository, file.name, revision=file.revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    if constants.is_offline_mode():
        raise TransferError(f"{where}: not in the local cache, and the Hub cannot be reached (offline?): give --data")

    url = f"{constants.ENDPOINT}/datasets/{file.repository}/resolve/{file.revision}/{quote(file.name)}"
    remote = Remote(url, f"data set {file.repository}", where, Tally())

    def ask() -> None:
        with remote.get({}):
            pass

    def attempt() -> Path:
        with hub_errors(f"data set {file.repository}", where):
            return Path(hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision))

    try:
        persist(lambda: where, ask, Event(), tries=FIRST_TRIES)  # the client would try for half a minute
        return persist(lambda: where, attempt, Event())
    except TransferError as error:
        if not isinstance(error.__cause__, PassingError):
            raise
        raise TransferError(
            f"{where}: the Hub cannot be reached ({error.__cause__}): try again later, or give --data FOLDER"
        ) from error
