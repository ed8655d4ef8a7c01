"""Recipes with mergekit's keys: each is told what it is called here, and docs/from_mergekit.md has them all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import Models, Run

import streammerge
from streammerge.errors import RecipeError
from streammerge.mergekit_names import OF_RECIPE, PAGE, of_parameter
from streammerge.methods import METHODS
from streammerge.recipe import Recipe, load_recipe, make_recipe, resolve_method

TEXT = (Path(__file__).parents[1] / PAGE).read_text("utf-8")
ROWS = [
    (re.findall(r"`([^`]+)`", keys), here)
    for keys, here in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", TEXT, re.MULTILINE)
    if not keys.startswith("`--")
]
PAIR: dict[str, Any] = {"base": "a", "models": ["b"]}
# mergekit's configuration schema: every key of its top level, of a model and of a slice.
ITS_KEYS = ("merge_method", "base_model", "dtype", "out_dtype", "slices", "modules", "tokenizer_source", "tokenizer")
ITS_KEYS += ("chat_template", "sources", "layer_range")


def message(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve_method(make_recipe(values), 10**9)
    assert "did you mean" not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", ITS_KEYS)
def test_every_key_of_its_recipes_is_told(key: str) -> None:
    assert message({**PAIR, key: "x"}) == f"recipe: there is no '{key}': {OF_RECIPE[key].text}; see {PAGE}"


@pytest.mark.parametrize("key", ["weight", "lambda", "int8_mask"])
def test_a_parameter_on_the_wrong_level(key: str) -> None:
    assert message({**PAIR, key: 1}).startswith(f"recipe: there is no '{key}': {OF_RECIPE[key].text}")
    beside = {"base": "a", "models": [{"model": "b", key: 1}]}
    assert message(beside).startswith(f"recipe: there is no 'models.0.{key}': {OF_RECIPE[key].text}")


@pytest.mark.parametrize("key", ["density", "normalize", "coefficient"])
def test_a_parameter_of_ours_on_the_wrong_level(key: str) -> None:
    told = "it is a parameter of a method: put it under 'parameters'"
    assert message({**PAIR, key: 1}) == f"recipe: there is no '{key}': {told}"


@pytest.mark.parametrize(
    ("method", "key", "words"),
    [
        ("ties", "weight", "here it is 'coefficient'"),
        ("ties", "lambda", "here it is 'scale'"),
        ("ties", "int8_mask", "leave it out: it changed a temporary mask only"),
        ("ties", "rescale", "leave it out: this method drops nothing at random"),
        ("task_arithmetic", "lambda", "leave it out, and multiply the coefficients by it"),
        ("task_arithmetic", "normalize", "leave it out: this method leaves no choice"),
        ("passthrough", "scale", "here it is 'coefficient'"),
        ("slerp", "weight", "leave it out: this method takes no weights"),
    ],
)
def test_parameters_of_its_methods(method: str, key: str, words: str) -> None:
    for_all = {**PAIR, "method": method, "parameters": {key: 1}}
    assert message(for_all) == f"method {method} has no parameter '{key}': {words}; see {PAGE}"
    assert of_parameter("densty", METHODS[method].Parameters.model_fields) is None
    if key == "weight":
        beside = {"base": "a", "method": method, "models": [{"model": "b", "parameters": {key: 1}}]}
        assert message(beside) == f"method {method}, model b: there is no '{key}': {words}; see {PAGE}"


def test_one_pointer_for_all_keys() -> None:
    told = message({"merge_method": "ties", "base_model": "a", "models": ["b"], "dtype": "bfloat16"})
    assert told.count(PAGE) == 1 and told.endswith(f"; see {PAGE}")
    assert all(key in told for key in ("'merge_method': here it is 'method'", "'base_model': here it is 'base'"))
    assert "missing" not in told  # the base is there, under its other name
    assert message({"base_model": "a"}) == (
        f"recipe: models is missing; there is no 'base_model': here it is 'base'; see {PAGE}"
    )


def test_the_page_has_every_key_and_says_what_the_messages_say() -> None:
    found = {key: here for keys, here in ROWS for key in keys}
    assert {*OF_RECIPE, "density", "rescale", "normalize", "scale", "t", "parameters", "models"} <= {*found}
    ours = {*Recipe.model_fields}
    ours |= {key for m in METHODS.values() for key in (*m.Parameters.model_fields, *m.Expert.model_fields)}
    for key, here in found.items():
        named = re.findall(r"`([^`]+)`", here)
        assert {*named} <= ours, f"{key}: no such key of ours"
        if here.strip() == "the same":
            assert key in ours
        if key in OF_RECIPE:
            assert all(f"'{name}'" in OF_RECIPE[key].text for name in named)
            assert OF_RECIPE[key].text.startswith("leave it out") == here.startswith("leave")


def test_the_recipe_of_the_page(models: Models, tmp_path: Path, run: Run) -> None:
    """Ours is one, mergekit's is refused in one line; the numbers are the same under the names of the table."""
    theirs, ours = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "theirs.yaml"
    path.write_text(theirs)
    result = run(path, "--out", tmp_path / "out")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and PAGE in result.err
    for name, folder in zip(("org/base", "org/math", "org/code"), models, strict=True):
        ours = ours.replace(name, str(folder))
    path.write_text(ours)
    with streammerge.plan(load_recipe(path)) as planned:
        assert [model["coefficient"] for model in planned.summary()["models"]] == [0.5, 0.3]
        assert planned.resolved.parameters == {"scale": 1.2, "normalize": True}
    old, new = yaml.safe_load(theirs), yaml.safe_load(ours)
    assert [entry["parameters"]["weight"] for entry in old["models"][1:]] == [
        entry["parameters"]["coefficient"] for entry in new["models"]
    ]
    assert old["parameters"]["lambda"] == new["parameters"]["scale"]
