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
        windows(
            encode(base, vocab_size, _text(path, settings.field), _OPTION),
            settings.samples,
            settings.length,
            f"{_OPTION} {path}",
        )
        for path in settings.text
    ]


def _text(path: str, field: str) -> str:
    text = read_text(path, _OPTION)
    return "\n\n".join(_records(path, text, field)) if path.endswith((".jsonl", ".ndjson")) else text


def _records(path: str, text: str, field: str) -> Sequence[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise RecipeError(f"{_OPTION} {path}, line {number}: not valid JSON") from None
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            names = ", ".join(sorted(record)) if isinstance(record, dict) else "no mapping"
            raise RecipeError(
                f"{_OPTION} {path}, line {number}: no text in field {field!r} (it has {names}): --calibration-field"
            )
        found.append(value)
    return found
