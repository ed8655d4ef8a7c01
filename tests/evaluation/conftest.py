"""A model that answers 7 to everything, and problems of our own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation.chain_model import BOXED_7, make_chain_model

WriteRows = Callable[[str, Sequence[Mapping[str, Any]]], Path]

ROWS = {
    "gsm8k": [
        {"question": "3 and 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"question": "2 and 2?", "answer": "#### 4"},
        {"question": "14 halved?", "answer": "#### 7"},
        {"question": "1 and 1?", "answer": "#### 2"},
    ],
    "math500": [{"problem": "$\\sqrt{49}$?", "solution": "It is $\\boxed{7}$.", "answer": "7", "level": 1}],
}


@pytest.fixture(scope="session")
def sevens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Answers \boxed{7} to every prompt of the six tasks. No test may change it."""
    return make_chain_model(tmp_path_factory.mktemp("evaluation") / "sevens", BOXED_7)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def data(write_rows: WriteRows, tmp_path: Path) -> Path:
    """gsm8k as TASK.jsonl, half of it answered by 7; math500 as TASK/test.jsonl, all of it."""
    write_rows("gsm8k.jsonl", ROWS["gsm8k"])
    write_rows("math500/test.jsonl", ROWS["math500"])
    return tmp_path / "data"
