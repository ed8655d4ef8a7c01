"""Results in a folder: of each task TASK.json, and TASK.responses.jsonl with all that was answered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.identity import differences
from streammerge.checkpoints.json_text import parse_object
from streammerge.checkpoints.output import transfer_errors
from streammerge.errors import CheckpointError, HeaderError, OutputExistsError
from streammerge.evaluation.settings import TASKS

if TYPE_CHECKING:
    from streammerge.evaluation.harness import Solved

COMPARISON = "compare"
_OURS = {f"{task}{end}" for task in TASKS for end in (".json", ".responses.jsonl")}
_OURS |= {f"{COMPARISON}.json", f"{COMPARISON}.md"}
_SHOWN = {"accuracy", "stderr", "mean_length", "truncated", "problems"}
_TEXTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")


def model_identity(model: Checkpoint) -> dict[str, Any]:
    """What tells a model from another: its tensors; of a local one also size and time of their files, and the SHA-256
    of what says how it generates.

    Raises:
        CheckpointError: it brings no tokenizer.
    """
    if not any(model.files.has(name) for name in _TOKENIZERS):
        raise CheckpointError(f"model {model.id}: brings no tokenizer: copy that of its base into it")
    local = model.folder is not None
    texts = {name: model.files.path(name) for name in _TEXTS if local and model.files.has(name)}
    with transfer_errors(f"model {model.id}", "cannot be read"):
        files: dict[str, Any] = {file: list(stamp) for file, stamp in model.stamps().items()}
        files |= {name: hashlib.sha256(disk.read_file(path)).hexdigest() for name, path in texts.items()}
    return {"id": model.id, "revision": model.revision, "fingerprint": model.fingerprint(), "files": files}


def check_folder(out: Path, model: Path | None = None) -> None:
    """Refuse an output folder that is a file, lies in the model, or holds files that are not ours.

    Raises:
        OutputExistsError: naming what is in the way.
        TransferError: it cannot be looked into.
    """
    with transfer_errors(out, "cannot be an output folder"):
        if out.exists() and not out.is_dir():
            raise OutputExistsError(f"output {out} is a file: choose another --out")
        if model is not None and (out.resolve() == model.resolve() or model.resolve() in out.resolve().parents):
            raise OutputExistsError(f"output folder {out} lies in the model {model}: choose another --out")
        files = (
            {path.name.removesuffix(".partial") for path in out.iterdir() if path.is_file()} if out.exists() else set()
        )
    if foreign := files - _OURS:
        raise OutputExistsError(
            f"output folder {out} holds {min(foreign)!r}, which is no result of an evaluation: choose another --out"
        )


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that a folder holds, by task; none where it is no folder of results.

    Raises:
        CheckpointError: a file of results is none of ours.
    """
    found = {}
    for task in TASKS:
        path = folder / f"{task}.json"
        if os.path.isfile(path):  # unlike Path.is_file, False for a name the system cannot hold
            with transfer_errors(path, "cannot be read"):
                raw = disk.read_file(path)
            try:
                record = parse_object(raw, str(path))
                if record["task"] != task or not record["scores"].keys() >= _SHOWN:
                    raise KeyError(task)
                _ = record["identity"]["model"]["id"], record["identity"]["settings"]["temperature"]
                _ = record["problems"]["rows"], record["problems"]["papers_file"]
            except (HeaderError, KeyError, TypeError, AttributeError):
                raise CheckpointError(
                    f"{path}: no result of `streammerge eval`: remove it, or evaluate again"
                ) from None
            found[task] = record
    return found


def require_same(path: Path, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a result that was made of another model, of other problems or with other settings.

    Raises:
        OutputExistsError: naming every difference.
    """
    if found := differences(record["identity"], identity):
        raise OutputExistsError(
            f"{path}: made with something else: {'; '.join(found)}: choose another --out, or replace it: --overwrite"
        )


def write_result(out: Path, task: str, record: Mapping[str, Any], solved: Sequence[Solved]) -> None:
    """Write a task's responses and then its result: whole or not there, whatever happens."""
    lines = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n" for problem in solved]
    write_files(out, {f"{task}.responses.jsonl": "".join(lines), f"{task}.json": json.dumps(record, indent=2) + "\n"})


def write_files(out: Path, texts: Mapping[str, str]) -> None:
    """Write small files, each whole or not there.

    Raises:
        TransferError: the disk refuses.
    """
    with transfer_errors(out, "cannot be written"):
        disk.make_folder(out)
        for name, text in texts.items():
            disk.replace_file(out / name, text.encode("utf-8", "backslashreplace"))
