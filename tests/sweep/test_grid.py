"""Points of a grid, and the recipes they are."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.sweep.grid import parse_grid, points

RECIPE: dict[str, Any] = {
    "base": "a",
    "models": [{"model": "b", "parameters": {"density": 0.9, "coefficient": 2.0}}, {"model": "c", "parameters": {}}],
    "parameters": {"theta": 0.2},
}


def test_values_are_those_of_a_recipe() -> None:
    found = parse_grid(["density=0.1,auto,[0.2, 0.4]", "norm-tolerance=off,0.05", "aim=0.4", "method=ties"])
    assert found == {
        "density": [0.1, "auto", [0.2, 0.4]],
        "norm_tolerance": ["off", 0.05],
        "aim": [0.4],
        "method": ["ties"],
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["density"], "write KEY=VALUE,VALUE"),
        (["=1"], "write KEY=VALUE,VALUE"),
        (["a b=1"], "write KEY=VALUE,VALUE"),
        (["density=0.1", "density=0.2"], "density is given twice"),
        (["density=[0.1"], "--set density="),
        (["density=!!python/name:os.system"], "plain values need none"),
    ],
)
def test_what_is_no_grid(texts: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("[", r"\[")):
        parse_grid(texts)


def test_all_combinations_in_order() -> None:
    found = points(RECIPE, {"density": [0.1, 0.2], "method": ["fim_ties", "fim_ta"]})
    assert [dict(point.settings) for point in found] == [
        {"density": density, "method": method} for density in (0.1, 0.2) for method in ("fim_ties", "fim_ta")
    ]
    first = found[0].recipe
    assert first["method"] == "fim_ties" and first["parameters"] == {"theta": 0.2, "density": 0.1}
    assert first["models"] == [{"model": "b", "parameters": {"coefficient": 2.0}}, {"model": "c", "parameters": {}}]
    assert RECIPE["models"][0]["parameters"]["density"] == 0.9, "the recipe itself stays"
    assert len({point.name for point in found}) == 4
    assert found[1].label == "density 0.1, method fim_ta"


def test_one_by_one() -> None:
    found = points(RECIPE, {"density": [0.1, 0.2], "aim": [0.4]}, one_by_one=True)
    assert [dict(point.settings) for point in found] == [{}, {"density": 0.1}, {"density": 0.2}, {"aim": 0.4}]
    assert found[0].recipe == RECIPE and found[0].label == "the recipe as it is"
    assert found[3].recipe == {**RECIPE, "aim": 0.4}


def test_a_setting_of_the_calibration() -> None:
    (point,) = points({**RECIPE, "calibration": {"text": ["t"], "rows": 3}}, {"calibration.samples": [4]})
    assert point.recipe["calibration"] == {"text": ["t"], "rows": 3, "samples": 4}


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"base": ["b"]}, "a sweep has one base"),
        ({"models": ["b"]}, "the models of its recipe"),
        ({"fisher": [1]}, "a sweep measures one Fisher: set it in the recipe"),
        ({"fisher.seed": [1, 2]}, "a sweep measures one Fisher: set it in the recipe"),
        ({"max_shard_bytes": ["1KB", "2KB"]}, "max_shard_bytes: cannot be varied: it changes no score: set it in the"),
        ({"allow_nonfinite": [True]}, "allow_nonfinite: cannot be varied: it changes no score"),
        ({"calibration.sample": [1]}, "did you mean 'samples'"),
        ({"density": []}, "give its values"),
        ({"density": [0.1, 0.2, 0.1]}, "the value 0.1 is given twice"),
        ({"density": [*range(101)], "theta": [*range(100)]}, "a sweep of 10100 points: 10000 at most"),
    ],
)
def test_what_cannot_be_varied(grid: dict[str, list[Any]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        points(RECIPE, grid)
