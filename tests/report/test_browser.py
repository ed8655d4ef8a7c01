"""The page as a browser shows it: nothing cut off, nothing blank, in a wide and a narrow window, light and dark."""

from __future__ import annotations

import base64
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import Shape, make_pair
from report.browser import DARK, Browser, Picture, find_chromium
from tiny_models import Models

import streammerge
from streammerge.checkpoints.checkpoint import PLOT_FILE
from streammerge.report.page import report_page
from streammerge.timeline import Phase

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

WIDTHS = [1200, 400]
PHASES = [Phase("plan", 0.25, 41 << 20), Phase("Fisher", 20.5, 676 << 20), Phase("merge", 8.5, 400 << 20)]
EDGE = 4  # pixels: where a figure's frame may be drawn


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    assert CHROMIUM is not None
    return Browser(CHROMIUM, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of a FIM-TIES merge of two fine-tunes, 28 blocks of 12 tensors; under "out", its folder."""
    folder = tmp_path_factory.mktemp("pair")
    base, *models = make_pair(Shape(32, 48, 28, 2, 1, 64, True), folder / "pair", experts=2, say=lambda line: None)
    recipe = {"base": str(base), "models": [*map(str, models)], "fisher": {"samples": 2, "length": 16}}
    manifest = streammerge.merge(recipe, folder / "out", device="cpu", threads=1)
    return {**manifest, "out": folder / "out"}


@pytest.fixture(scope="module")
def page(merged: dict[str, Any]) -> bytes:
    return report_page(merged, PHASES)


def ink(picture: Picture) -> float:
    """The part of a picture that is not as its most frequent grey."""
    values, counts = np.unique(picture.round(2), return_counts=True)
    return float((abs(picture - values[counts.argmax()]) > 0.2).mean())


def cut(picture: Picture, box: dict[str, Any]) -> Picture:
    x, y = round(box["x"]), round(box["y"])
    return picture[y : y + round(box["height"]), x : x + round(box["width"])]


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_there_and_nothing_beside_the_page(browser: Browser, page: bytes, width: int) -> None:
    found = browser.measure(page, width)
    assert found["wanted"] <= found["there"] == width
    boxes = found["boxes"]
    headings = [box["text"] for box in boxes if box["tag"] == "h2"]
    assert headings == ["Blocks", "Tensors", "Time and memory", "Recipe and sources", "Shards"]
    figures = [box for box in boxes if box["tag"] == "svg"]
    assert len(figures) == 5
    for box in figures:
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["width"] >= 350 and box["height"] >= 100
    assert found["letters"] >= 8, "the smallest letters of a figure, in pixels"
    beside = figures[0]["y"] == figures[1]["y"]
    assert beside is (width == 1200), "two in a row where there is room, else one below the other"
    for one, other in pairwise(figures):
        apart = one["x"] + one["width"] <= other["x"] or one["y"] + one["height"] <= other["y"]
        assert apart, "figures overlap"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_figures_are_drawn_where_they_are(browser: Browser, page: bytes, width: int) -> None:
    """Beside the same page with its figures emptied, the pictures differ there and nowhere else."""
    found = browser.measure(page, width)
    height = round(found["height"])
    drawn = browser.picture(page, width, height)
    emptied = re.sub(rb"(<svg [^>]*>).*?(</svg>)", rb"\1\2", page, flags=re.DOTALL)
    assert emptied.count(b"<svg ") == 5 and len(emptied) < len(page) / 2
    empty = browser.picture(emptied, width, height)
    inside = np.zeros_like(drawn, dtype=bool)
    for box in (box for box in found["boxes"] if box["tag"] == "svg"):
        assert ink(cut(drawn, box)) > 0.01, "a figure is blank"
        assert np.ptp(cut(empty, box)) < 0.01
        y, x = round(box["y"]), round(box["x"])
        inside[y - EDGE : y + round(box["height"]) + EDGE, max(x - EDGE, 0) : x + round(box["width"]) + EDGE] = True
    assert abs(drawn - empty)[~inside].max() < 0.01


def test_a_table_fits_or_shows_that_it_scrolls(browser: Browser, page: bytes) -> None:
    """By a shade at its right edge, behind which there is more of it."""
    for width, scrolls in ((1100, False), (400, True)):
        found = browser.measure(page, width)
        box = next(box for box in found["boxes"] if box["tag"] == "table" and box["text"].startswith("Sources"))
        right = width - round(box["x"])  # the page has the same margin on both sides
        assert (box["x"] + box["width"] > right + 1) is scrolls
        picture = browser.picture(page, width, round(found["height"]))
        edge = picture[round(box["y"]) : round(box["y"] + box["height"]), right - 3 : right]
        assert bool(np.median(edge) < 0.8) is scrolls


def test_the_curve_is_the_merges(browser: Browser, merged: dict[str, Any]) -> None:
    """A coefficient twice as large is drawn twice as high: the dots are where the numbers say."""

    def height_of_dots(alpha: float) -> float:
        rows = [{**row, "alpha": alpha} for row in merged["blocks"] if row["expert"] == merged["blocks"][0]["expert"]]
        rows = [{key: value for key, value in row.items() if key != "expert"} for row in rows]
        page = report_page({**merged, "blocks": rows}, PHASES)
        box = next(box for box in browser.measure(page, 1200)["boxes"] if box["tag"] == "svg")
        panel = cut(browser.picture(page, 1200, 1000), box)
        dark = (panel < 0.4)[:, round(0.2 * box["width"]) : round(0.95 * box["width"])]
        lines = dark.mean(1)
        lines[lines > 0.98] = 0  # the frame
        return float(box["height"] - lines.argmax())

    heights = [height_of_dots(alpha) for alpha in (0.2, 0.4, 0.8)]
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]), abs=4)
    assert heights[2] - heights[1] > 80


def test_dark_and_light(browser: Browser, page: bytes) -> None:
    """With the reader's dark colours paper is dark and ink light, in the figures too."""
    light, dark = (browser.picture(page, 800, 1500, options) for options in ((), DARK))
    assert np.median(light) > 0.95 and np.median(dark) < 0.15
    box = next(box for box in browser.measure(page, 800)["boxes"] if box["tag"] == "svg")
    for picture, paper in ((light, 1.0), (dark, 0.0)):
        panel = cut(picture, box)
        assert abs(np.median(panel) - paper) < 0.15
        assert (abs(panel - paper) > 0.6).mean() > 0.01


def test_a_name_that_is_a_script_does_not_run(browser: Browser, merged: dict[str, Any]) -> None:
    name = "</title></style><script>ran = parent.ran = true</script><img src=x onerror='parent.ran = true'>"
    sources = [{**source, "id": source["id"] + name} for source in merged["sources"]]
    tensors = {key + name: entry for key, entry in merged["tensors"].items()}
    hostile = report_page({**merged, "sources": sources, "tensors": tensors, "notes": [name]}, PHASES)
    found = browser.measure(hostile, 400)
    assert found["scripts"] is False
    assert found["wanted"] <= 400
    assert len([box for box in found["boxes"] if box["tag"] == "svg"]) == 5


@pytest.mark.parametrize("method", ["ties", "karcher"])
def test_a_method_without_blocks(browser: Browser, saved_models: Models, tmp_path: Path, method: str) -> None:
    recipe = {"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": method}
    found = browser.measure(report_page(streammerge.merge(recipe, tmp_path / "out"), PHASES), 400)
    assert found["wanted"] <= 400
    assert len([box for box in found["boxes"] if box["tag"] == "svg"]) == 2


def test_the_cards_picture(browser: Browser, merged: dict[str, Any]) -> None:
    """As an image on a page: a frame, ticks and a curve for each model, in black on white."""
    raw = (merged["out"] / PLOT_FILE).read_bytes()
    text = base64.b64encode(raw).decode()
    image = f'<img src="data:image/png;base64,{text}">'
    picture = browser.picture(f'<!DOCTYPE html><body style="margin:0">{image}'.encode(), 1050, 450)
    assert 0.02 < ink(picture) < 0.2
    assert np.median(picture) > 0.98
    assert ((picture < 0.3).mean(1) > 0.8).sum() >= 2, "the frame's top and bottom"
    for quarter in np.split(picture[20:370, 100:1020], 4, axis=1):
        assert ink(quarter) > 0.02, "the curves go from side to side"


def test_browsers(browser: Browser) -> None:
    """What the measures themselves would say of a page that is too wide, and of one that is blank."""
    wide = browser.measure(b'<!DOCTYPE html><body><div style="width:900px">x</div><svg></svg>', 400)
    assert wide["wanted"] >= 900 > wide["there"]
    assert ink(browser.picture(b"<!DOCTYPE html><body>", 400, 300)) == 0
