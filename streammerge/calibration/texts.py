"""From a calibration file to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from streammerge.calibration.store import CalibrationSettings
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import RecipeError
from streammerge.fisher.probes import encode, read_text, windows

_OPTION = "--calibration"


def calibration_tokens(base: Checkpoint, vocab_size: int, settings: CalibrationSettings) -> list[Tensor]:
    """Token ids [samples, length] of every text, int64, by the base's own tokenizer: evenly spread windows.

    The records of a JSONL file follow one another, an empty line between two.

    Raises:
        RecipeError: a file cannot be read, is no JSONL, has no such field, or is too short.
        CheckpointError: the base brings no tokenizer, or one that knows more tokens than the model.
    """
    return [
        file_windows(base, vocab_size, path, settings.field, settings.samples, settings.length, _OPTION)
        for path in settings.text
    ]


def file_windows(
    base: Checkpoint, vocab_size: int, path: str, field: str, samples: int, length: int, option: str
) -> Tensor:
    """Token ids [samples, length] of one text, which `option` names; the field of its records by `option`-field."""
    text = read_text(path, option)
    if path.endswith((".jsonl", ".ndjson")):
        text = "\n\n".join(_records(path, text, field, option))
    return windows(encode(base, vocab_size, text, option), samples, length, f"{option} {path}")


def _records(path: str, text: str, field: str, option: str) -> Sequence[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise RecipeError(f"{option} {path}, line {number}: not valid JSON") from None
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            names = ", ".join(sorted(record)) if isinstance(record, dict) else "no mapping"
            raise RecipeError(
                f"{option} {path}, line {number}: no text in field {field!r} (it has {names}): {option}-field"
            )
        found.append(value)
    return found
