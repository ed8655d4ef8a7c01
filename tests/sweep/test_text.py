"""The Pareto front by its definition, and what is printed of it."""

from __future__ import annotations

import io
import random
import re
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from streammerge.sweep.text import front_lines, pareto_front, sweep_markdown, sweep_plot, sweep_rows, sweep_text


def test_a_front_by_hand() -> None:
    """(accuracy, length): the third is as accurate as the first and longer; the fourth is worse in both."""
    scores = [(0.8, 50.0), (0.9, 70.0), (0.8, 60.0), (0.7, 55.0), (0.5, 10.0), (0.9, 70.0)]
    assert pareto_front(scores) == [True, True, False, False, True, True]
    assert pareto_front([(0.1, 1.0)]) == [True]
    assert pareto_front([]) == []


def test_a_front_against_a_staircase() -> None:
    """Walked from the shortest on, a point is on the front if it is more accurate than all shorter ones."""
    draw = random.Random(0)
    for _ in range(50):
        scores = [(draw.randrange(6) / 5, float(draw.randrange(6))) for _ in range(draw.randrange(1, 12))]
        best: dict[float, float] = {}
        for accuracy, length in scores:
            best[length] = max(accuracy, best.get(length, 0.0))
        steps, most = set(), -1.0
        for length in sorted(best):
            if best[length] > most:
                most = best[length]
                steps.add((most, length))
        assert pareto_front(scores) == [score in steps for score in scores]


def point(accuracy: float, length: float, front: bool, **settings: Any) -> dict[str, Any]:
    scores = {"accuracy": accuracy, "mean_length": length, "truncated": 0.25}
    return {"point": "x", "settings": settings, "scores": scores, "front": front}


RESULT: dict[str, Any] = {
    "version": "0",
    "evaluation": "mini_l2s",
    "limit": 20,
    "grid": {"density": [0.1, 0.2], "method": ["ties"]},
    "sources": [
        {"role": "base", "id": "base|x", "revision": None},
        {"role": "expert", "id": "<b>`\n# no", "revision": None},
    ],
    "points": [point(0.5, 30.0, True, density=0.1), point(0.25, 40.0, False, density=0.2), point(0.4, 20.0, True)],
    "notes": ["[a](b)"],
}


def test_rows_and_front() -> None:
    header, rows = sweep_rows(RESULT)
    assert header == ["#", "density", "method", "accuracy", "length", "truncated", "front"]
    assert rows[0] == ["1", "0.1", "-", "50.0%", "30.0", "25.0%", "*"]
    assert rows[1][-1] == "" and rows[2][1] == "-"
    assert front_lines(RESULT) == [
        "#3: 40.0% in 20.0 tokens: the recipe as it is",
        "#1: 50.0% in 30.0 tokens: density 0.1",
    ]
    assert sweep_text(RESULT).endswith("#1: 50.0% in 30.0 tokens: density 0.1\nnote: [a](b)")


def test_names_do_not_break_out_of_the_page() -> None:
    text = sweep_markdown(RESULT, "sweep.png")
    assert text.startswith("# Sweep: \\<b\\>\\`\\\\n\\# no into base\\|x\n")
    assert "![Accuracy over mean length of the points, the Pareto front joined](sweep.png)" in text
    assert "the first 20 problems" in text and "- \\[a\\](b)" in text
    assert "sweep.png" not in sweep_markdown(RESULT, None)
    fewer = {**RESULT, "points": [{**p, "scores": {**p["scores"], "problems": 7}} for p in RESULT["points"]]}
    assert "the first 7 problems" in sweep_markdown(fewer, None)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}


def test_the_picture() -> None:
    raw = sweep_plot(RESULT)
    assert raw == sweep_plot(RESULT) and b"Software" not in raw
    picture = imread(io.BytesIO(raw))
    assert picture.shape == (675, 1050, 4)
    assert np.allclose(picture[..., 0], picture[..., 1]) and np.allclose(picture[..., 1], picture[..., 2])
    more = {**RESULT, "points": [*RESULT["points"], point(0.3, 60.0, False)]}
    assert sweep_plot(more) != raw


def test_the_front_runs_through_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a number stands, the picture is the same with and without the line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures: list[Any] = []
    monkeypatch.setattr(
        import_module("streammerge.sweep.text"), "picture", lambda figure, form: figures.append(figure) or b""
    )
    near = [point(0.4, 30.0, True), point(0.5, 30.3, True), point(0.39, 30.1, False), point(0.9, 50.0, True)]
    sweep_plot({**RESULT, "points": near})
    (axis,) = figures[0].axes
    front, canvas = axis.lines[0], FigureCanvasAgg(figures[0])
    canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    pictures = []
    for visible in (True, False):
        front.set_visible(visible)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[::-1].copy())  # rows from below, as boxes count
    for box in boxes:
        rows, columns = slice(int(box.y0), int(box.y1) + 1), slice(int(box.x0), int(box.x1) + 1)
        assert (pictures[0][rows, columns] == pictures[1][rows, columns]).all()
    assert (pictures[0] != pictures[1]).any()
