"""The figures of a report hold the manifest's numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from streammerge.report.panels import coefficient_panel, phase_panel, size_panel, spread, strip_panel, strips
from streammerge.timeline import Phase


def tensor(block: int | None, numel: int = 10, **values: Any) -> dict[str, Any]:
    return {"block": block, "numel": numel, **values}


def block(number: int, alpha: float, **values: Any) -> dict[str, Any]:
    return {"block": number, "alpha": alpha, "fisher_mean": None, "task_vector_mean_square": None, **values}


def points(axis: Any) -> list[list[tuple[float, float]]]:
    """Every line that is drawn, as its points."""
    return [[(float(x), float(y)) for x, y in np.transpose(line.get_data())] for line in axis.lines]


def test_tensors_of_one_kind_make_a_strip() -> None:
    result = {
        "tensors": {
            "model.layers.0.mlp.up_proj.weight": tensor(0, kept=2, norm_ratio=1.5),
            "model.layers.1.mlp.up_proj.weight": tensor(1, kept=5, norm_ratio=0.5),
            "model.layers.0.mlp.experts.7.w1.weight": tensor(0, kept=[1, 4], norm_ratio=None),
            "model.layers.0.mlp.experts.12.w1.weight": tensor(0, kept=[3, 8]),
            "model.layers.0.norm.weight": tensor(0),
            "lm_head.weight": tensor(None, kept=9),
            "h.3.up": tensor(3, 0, kept=0),
        }
    }
    found = {strip.kind: strip.models for strip in strips(result, "kept")}
    assert found == {
        "mlp.up_proj.weight": [{0: [0.2], 1: [0.5]}],
        "mlp.experts.*.w1.weight": [{0: [0.1, 0.3]}, {0: [0.4, 0.8]}],
        "up": [{3: [0.0]}],
    }
    (only,) = strips(result, "norm_ratio")
    assert (only.kind, only.models) == ("mlp.up_proj.weight", [{0: [1.5], 1: [0.5]}])


def test_a_strip_marks_means_and_spans_what_is_between() -> None:
    values = {
        "layers.0.e.1.w": tensor(0, kept=1),
        "layers.0.e.2.w": tensor(0, kept=3),
        "layers.4.e.1.w": tensor(4, kept=8),
    }
    figure = strip_panel(strips({"tensors": values}, "kept"), lambda value: f"{value:.1f}", (0.0, 1.0), 0.5)
    (axis,) = figure.axes
    means, span, compared = points(axis)
    assert means == [(0.0, pytest.approx(0.2)), (4.0, pytest.approx(0.8))]
    assert span == [(0.0, pytest.approx(0.1)), (0.0, pytest.approx(0.3))]
    assert [y for _, y in compared] == [0.5, 0.5]
    assert (axis.get_title("left"), axis.get_title("right")) == ("e.*.w", "0.1 to 0.8")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.0", "1.0"]


def test_a_name_that_is_no_text_of_ours() -> None:
    values = {f"layers.0.$x^2$\u202e{'a' * 60}": tensor(0, kept=1)}
    figure = strip_panel(strips({"tensors": values}, "kept"), str, (0.0, 1.0))
    title = figure.axes[0].get_title("left")
    assert title == "..." + "a" * 37


def test_coefficients_over_the_blocks() -> None:
    rows = [
        block(0, 0.5, expert="b"),
        block(1, -0.25, expert="b"),
        block(0, 0.75, expert="c"),
        block(0, 0.8, expert="c"),
    ]
    (axis,) = coefficient_panel(rows).axes
    assert points(axis) == [[(0, 0.5), (1, -0.25)], [(0, 0.75), (0, 0.8)]]
    assert [line.get_linestyle() for line in axis.lines] == ["-", "None"], "several tensors of a block are no line"
    assert len({line.get_marker() for line in axis.lines}) == 2
    low, high = axis.get_ylim()
    assert low < -0.25 and high > 1
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["model 1", "model 2"]


def test_sizes_on_log_scales_with_gaps() -> None:
    rows = [
        block(number, 0.5, expert=name, fisher_mean=10.0**-number if number else None, task_vector_mean_square=value)
        for name, squares in (("b", (1e-6, 0.0, 1e-8)), ("c", (1e-5, 1e-5, 1e-5)))
        for number, value in enumerate(squares)
    ]
    fisher, vectors = size_panel(rows).axes
    assert fisher.get_yscale() == vectors.get_yscale() == "log"
    (of_base,) = points(fisher)
    assert math.isnan(of_base[0][1]) and of_base[1:] == [(1, 0.1), (2, 0.01)]
    first, second = points(vectors)
    assert math.isnan(first[1][1]) and [first[0][1], first[2][1]] == [1e-6, 1e-8]
    assert second == [(0, 1e-5), (1, 1e-5), (2, 1e-5)]
    assert len(size_panel([{**row, "fisher_mean": None} for row in rows]).axes) == 1
    assert size_panel([block(0, 0.5)]) is None


@pytest.mark.parametrize("most", [1.0, 1.01, 1.3, 2.0, 3.3, 5.0, 8.0, 9.9, 11.0, 40.0, 150.0, 900.0, 1e4, 1e7, 1e30])
@pytest.mark.parametrize("least", [1e-9, 2.3e-6, 3e1, 7.7])
def test_the_labels_of_a_log_scale_do_not_overlap(least: float, most: float) -> None:
    """There are at least two, as far as a scale has a width, and all are in the panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = [
        block(number, 0.5, fisher_mean=value, task_vector_mean_square=value)
        for number, value in enumerate((least, least * most))
    ]
    figure = size_panel(rows)
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        low, high = axis.get_ylim()
        shown = [
            label.get_window_extent()
            for which in (False, True)
            for tick, label in zip(axis.get_yticks(minor=which), axis.get_yticklabels(minor=which), strict=True)
            if low <= tick <= high and label.get_text()
        ]
        assert len(shown) >= 2
        shown.sort(key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(shown))


def test_phases_are_bars() -> None:
    figure = phase_panel([Phase("plan", 0.5, 40 << 20), Phase("merge", 2.0, 300 << 20)])
    seconds, memory = figure.axes
    assert [bar.get_width() for bar in seconds.patches] == [0.5, 2.0]
    assert [bar.get_width() for bar in memory.patches] == [40.0, 300.0]
    assert [label.get_text() for label in seconds.get_yticklabels()] == ["plan", "merge"]
    assert [text.get_text() for text in memory.texts] == ["40", "300"]
    assert len(phase_panel([Phase("plan", 0.0, None)]).axes) == 1


def test_a_spread_in_words() -> None:
    assert spread([0.21, 0.2], lambda value: f"{value:.1f}") == "0.2"
    assert spread([2.0, 1.0], str) == "1.0 to 2.0"
