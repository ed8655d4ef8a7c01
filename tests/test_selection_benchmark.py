"""The benchmark of the selection finds every way in which a selection can be wrong."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import selection
import torch
from selection import BLOCK_ROWS, COLUMNS, KINDS, Found, Stream, check, check_sorted, select
from torch import Tensor

ROOT = Path(__file__).parents[1]
ELEMENTS = 40 * COLUMNS


def test_the_whole_on_a_small_matrix() -> None:
    """In a process of its own: it looks at the memory of the process."""
    command = [sys.executable, "benchmarks/selection.py", "--elements", str(ELEMENTS)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [kind for kind in KINDS for _ in BLOCK_ROWS]
    assert {row[2] for row in rows} == {f"{ELEMENTS // 5:,}"}
    assert "peak memory" in done.stdout and "every element" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_blocks(kind: str) -> None:
    few, many = (torch.cat([block.stored[0] for block in Stream(kind, ELEMENTS, rows).blocks()]) for rows in (40, 3))
    assert torch.equal(few, many) and few.shape == (40, COLUMNS)
    assert few.dtype == torch.float32 and bool((few >= 0).all())


def test_kinds_of_scores() -> None:
    scores = {kind: KINDS[kind](0, (40, COLUMNS)) for kind in KINDS}
    counts = {kind: values.unique(return_counts=True)[1] for kind, values in scores.items()}
    assert counts["bfloat16"].max() > ELEMENTS / 50 and len(counts["bfloat16"]) > 100
    assert len(counts["float32"]) > 0.9 * ELEMENTS and len(counts["equal"]) == 1
    assert 0 < scores["denormal"].max() < torch.finfo(torch.float32).tiny


def found(stream: Stream, **changes: Any) -> Found:
    """What the passes find, with a wrong selection in place of the right one."""
    right = select(stream)
    return replace(right, selections=[replace(right.selections[0], **changes), *right.selections[1:]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda s: {}, None),
        (lambda s: {"threshold": s.threshold + (1 << 16)}, "is not the 65536-th largest"),
        (lambda s: {"threshold": s.threshold - (1 << 16)}, "is not the 65536-th largest"),
        (lambda s: {"cutoff": s.cutoff - 1}, "another mask"),
        (lambda s: {"cutoff": s.cutoff + COLUMNS}, "another mask"),
        (lambda s: {"kept": s.kept + 1}, "are kept"),
    ],
)
def test_a_wrong_selection_stops_it(changes: Any, message: str | None) -> None:
    stream = Stream("bfloat16", ELEMENTS, 7)
    wrong = found(stream, **changes(select(stream).selections[0]))
    if message is None:
        check(stream, wrong)
        return
    with pytest.raises(SystemExit, match=message):
        check(stream, wrong)


def test_a_sort_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sorted("bfloat16", ELEMENTS)

    def other(first: int, shape: tuple[int, int]) -> Tensor:
        return KINDS["bfloat16"](first + ELEMENTS, shape)

    honest = select(Stream("bfloat16", ELEMENTS, 7))
    monkeypatch.setattr(selection, "select", lambda stream: honest)
    monkeypatch.setitem(KINDS, "other", other)
    with pytest.raises(SystemExit, match="other: not what a stable sort gives"):
        check_sorted("other", ELEMENTS)
