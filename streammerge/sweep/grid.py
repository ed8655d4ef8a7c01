"""Which recipes a sweep merges: a base recipe, and values for some of its keys or of its method's parameters."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.calibration.store import CalibrationSettings
from streammerge.errors import RecipeError
from streammerge.recipe import Recipe
from streammerge.schema import suggest
from streammerge.yaml_text import parse_yaml

Grid = Mapping[str, Sequence[Any]]

MOST_POINTS = 10_000
_MOST_VALUES = 1000  # of one key
_KEYS = ("method", "aim")
_FIXED = {
    "base": "a sweep has one base",
    "models": "a sweep has the models of its recipe",
    "parameters": "name the parameter itself",
    "fisher": "a sweep measures one Fisher: set it in the recipe",
    "fisher_from": "a sweep measures one Fisher, or reuses the recipe's",
    "calibration": "name its setting: calibration.samples",
    "max_shard_bytes": "it changes no score: set it in the recipe",
    "allow_nonfinite": "it changes no score: set it in the recipe",
}


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep.

    Attributes:
        settings: the values that are its own, by key.
        recipe: the values of the recipe with them.
    """

    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A short name of its own, the same in every sweep with these settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        return ", ".join(f"{key} {told(value)}" for key, value in self.settings.items()) or "the recipe as it is"


def told(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=value,value,...` of the command line; a value is as in a recipe, [0.1, 0.3] one with commas.

    Raises:
        RecipeError: no such form, a key given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key):
            raise RecipeError(f"--set {text}: write KEY=VALUE,VALUE,...: --set density=0.1,0.2,0.4")
        if key in grid:
            raise RecipeError(f"--set {text}: {key} is given twice: put all its values into one --set")
        try:
            grid[key] = parse_yaml(f"[{values}]", _MOST_VALUES, place=False)
        except ValueError as error:
            raise RecipeError(f"--set {text}: {error}") from None
    return grid


def points(recipe: Mapping[str, Any], grid: Grid, *, one_by_one: bool = False) -> list[Point]:
    """The points of a sweep, in order, the first key varying slowest.

    Args:
        recipe: the values of the base recipe.
        one_by_one: the recipe as it is, then each key varied alone; else every combination.

    Raises:
        RecipeError: a key that a sweep cannot vary, no values, too many points.
    """
    if not isinstance(grid, Mapping):
        raise RecipeError('a grid is a mapping of keys and lists of values: {"density": [0.1, 0.2]}')
    for key, values in grid.items():
        _check(key, values)
    count = 1 + sum(map(len, grid.values())) if one_by_one else _product(grid)
    if count > MOST_POINTS:
        raise RecipeError(f"a sweep of {count} points: {MOST_POINTS} at most; give fewer values, or --one-by-one")
    settings: list[dict[str, Any]]
    if one_by_one:
        settings = [{}, *({key: value} for key, values in grid.items() for value in values)]
    else:
        settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Point(own, _with(recipe, own)) for own in settings]


def _product(grid: Grid) -> int:
    count = 1
    for values in grid.values():
        count *= len(values)
    return count


def _check(key: str, values: Sequence[Any]) -> None:
    head, _, rest = key.partition(".")
    if key in _FIXED or (head in Recipe.model_fields and head != "calibration" and rest):
        raise RecipeError(f"--set {key}: cannot be varied: {_FIXED.get(head, 'it has no parts')}")
    if head == "calibration" and rest not in CalibrationSettings.model_fields:
        raise RecipeError(f"--set {key}: no such setting: {suggest(rest, CalibrationSettings.model_fields)}")
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RecipeError(f"--set {key}: give a list of values, also for one alone: [{values!r}]")
    if not values:
        raise RecipeError(f"--set {key}: give its values: --set {key}=VALUE,VALUE,...")
    texts = [json.dumps(value) for value in values]
    if twice := [text for number, text in enumerate(texts) if text in texts[:number]]:
        raise RecipeError(f"--set {key}: the value {twice[0]} is given twice")


def _with(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with these settings. What stands beside a model gives way to them."""
    values = copy.deepcopy(dict(recipe))
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        if key in _KEYS:
            values[key] = value
        elif rest:
            values[head] = {**(values.get(head) or {}), rest: value}
        else:
            values["parameters"] = {**(values.get("parameters") or {}), key: value}
            for model in values["models"]:
                if isinstance(model, dict):
                    (model.get("parameters") or {}).pop(key, None)
    return values
