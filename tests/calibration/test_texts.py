"""From calibration files to windows of tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibration.conftest import LENGTH, SAMPLES, TEXT, Family, windows_of

from streammerge.calibration.store import check_texts
from streammerge.calibration.texts import calibration_tokens
from streammerge.errors import RecipeError

Make = Callable[..., Family]


def test_windows_are_evenly_spread(family: Make) -> None:
    made = family()
    with made.open()[0] as base:
        (ids,) = calibration_tokens(base, 97, made.settings)
    assert torch.equal(ids, made.ids)
    assert (ids.shape, ids.dtype) == ((SAMPLES, LENGTH), torch.int64)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson"])
def test_records_follow_one_another(family: Make, tmp_path: Path, ending: str) -> None:
    """Joined by an empty line; the letters' tokenizer drops line breaks, so they read like one text."""
    path = tmp_path / f"records{ending}"
    path.write_text("\n".join(json.dumps({"body": piece, "n": 1}) for piece in TEXT.split("bear")) + "\n\n")
    made = family(text=[str(path)], field="body")
    with made.open()[0] as base:
        (ids,) = calibration_tokens(base, 97, made.settings)
    assert torch.equal(ids, windows_of(TEXT.replace("bear", "")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}', r"line 2: no text in field 'text' \(it has text\): --calibration-field"),
        ('{"text": "a"}\n\n{"question": "a", "answer": "b"}', r"line 3: .*it has answer, question"),
        ("[1]", r"line 1: no text in field 'text' \(it has no mapping\)"),
        ("{", "line 1: not valid JSON"),
        ('{"text": "tooshort"}', r"8 tokens, and 5 samples of 12 take 60: give a longer text, or fewer samples"),
    ],
)
def test_bad_records(family: Make, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    made = family(text=[str(path)])
    with made.open()[0] as base, pytest.raises(RecipeError, match=rf"^--calibration {path}.*{message}"):
        calibration_tokens(base, 97, made.settings)


def test_how_many_texts(family: Make, tmp_path: Path) -> None:
    one, three = family().settings, family(text=[str(tmp_path / "text.txt")] * 3).settings
    check_texts(one, ["mutual_information", "channels", "inputs"], 3, "method m")
    check_texts(three, ["inputs"], 3, "method m")
    with pytest.raises(RecipeError, match="method m: 3 calibration texts for 3 models: give one$"):
        check_texts(three, ["channels"], 3, "method m")
    with pytest.raises(RecipeError, match="method m: 3 calibration texts for 3 models"):
        check_texts(three, ["inputs", "channels"], 3, "method m")
    with pytest.raises(RecipeError, match="3 calibration texts for 4 models: give one for all, or 4: the base's first"):
        check_texts(three, ["inputs"], 4, "method m")
    with pytest.raises(RecipeError, match="method m needs a calibration text: give --calibration FILE"):
        check_texts(one.model_copy(update={"text": []}), ["inputs"], 3, "method m")
    with pytest.raises(RecipeError, match="method m with these parameters uses no calibration text: leave"):
        check_texts(one, [], 3, "method m")
    with pytest.raises(RecipeError, match="--calibration missing: No such file"):
        check_texts(one.model_copy(update={"text": ["missing"]}), ["inputs"], 3, "method m")
