"""Recipes: defaults, short forms, YAML, and parameters shared out to the models."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from streammerge import FisherSettings, Recipe, load_recipe, make_recipe
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.recipe import DEFAULT_METHOD, ExpertSpec, Resolved, resolve_method

PAIR: dict[str, Any] = {"base": "a", "models": ["b"]}


def resolved(size: int = 10**9, /, **values: Any) -> Resolved:
    return resolve_method(make_recipe(PAIR | values), size)


def test_defaults() -> None:
    recipe = make_recipe(PAIR)
    assert recipe == Recipe(
        base="a",
        models=[ExpertSpec(model="b", parameters={})],
        method=DEFAULT_METHOD,
        parameters={},
        fisher=FisherSettings.model_validate({}),
        fisher_from=None,
        max_shard_bytes=5 * 10**9,
        allow_nonfinite=False,
    )
    numbers = {"samples": 8, "length": 64, "seed": 42}
    rest = {"compute_dtype": None, "dtype": None, "probe_text": None, "all_parameters": False}
    assert recipe.fisher.model_dump() == numbers | rest


def test_a_recipe_is_itself_and_is_read_again() -> None:
    recipe = make_recipe(PAIR | {"method": "ties", "parameters": {"density": 0.5}})
    assert make_recipe(recipe) is recipe
    assert make_recipe(recipe.model_dump()) == recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.base = "other"


@pytest.mark.parametrize("name", [name for method in METHODS for name in (method, method.replace("_", "-"))])
def test_every_method_with_underscores_or_hyphens(name: str) -> None:
    assert make_recipe(PAIR | {"method": name}).method == name.replace("-", "_")


@pytest.mark.parametrize("size", [1000, "1000", "1KB", "1e3"])
def test_shard_sizes(size: Any) -> None:
    assert make_recipe(PAIR | {"max_shard_bytes": size}).max_shard_bytes == 1000


def test_models_short_and_long() -> None:
    models = make_recipe(PAIR | {"models": ["b", {"model": "c", "parameters": {"density": 1}}]}).models
    assert [(model.model, model.parameters) for model in models] == [("b", {}), ("c", {"density": 1})]


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: a\nmodels:\n- b\nparameters: {density: 1e-1}\nfisher:\n  samples: 2\n", "utf-8")
    values = load_recipe(path)
    assert values == {"base": "a", "models": ["b"], "parameters": {"density": "1e-1"}, "fisher": {"samples": 2}}
    recipe = make_recipe(values)
    assert recipe.fisher.samples == 2
    assert resolve_method(recipe, 1).experts[0]["density"] == 0.1


@pytest.mark.parametrize(
    "text", ["parameters: {density: 1, density: 2}", "fisher:\n  seed: 1\n  seed: 2", "x: 1\nx: 1"]
)
def test_a_key_given_twice_at_any_depth(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="is given twice"):
        load_recipe(path)


def test_anchors_and_merges_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &b a\nmodels: [*b]\nparameters: {<<: {density: 1}, theta: 2}\n")
    assert load_recipe(path) == {"base": "a", "models": ["a"], "parameters": {"density": 1, "theta": 2}}


# --- parameters ---------------------------------------------------------------------------------------------------


def test_one_value_holds_for_all_a_list_for_each_and_the_models_own_goes_first() -> None:
    models = ["b", {"model": "c", "parameters": {"density": 0.1}}]
    one = resolved(method="ties", models=models, parameters={"density": 0.5, "coefficient": [2]})
    each = resolved(method="ties", models=models, parameters={"density": [0.3, 0.4], "coefficient": [1, 3]})
    assert [(expert["density"], expert["coefficient"]) for expert in one.experts] == [(0.5, 2.0), (0.1, 2.0)]
    assert [(expert["density"], expert["coefficient"]) for expert in each.experts] == [(0.3, 1.0), (0.1, 3.0)]


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_recipe_names_every_parameter_and_resolves_to_itself(method: str) -> None:
    cls = METHODS[method]
    count = max(cls.fewest_experts, 1)
    first = resolved(method=method, models=["b"] * count)
    assert first.parameters.keys() == cls.Parameters.model_fields.keys()
    assert all(expert.keys() == cls.Expert.model_fields.keys() for expert in first.experts)
    models = [{"model": "b", "parameters": parameters} for parameters in first.experts]
    again = resolved(method=method, models=models, parameters=first.parameters)
    assert (again.parameters, again.experts) == (first.parameters, first.experts)


@pytest.mark.parametrize(("size", "density"), [(2_999_999_999, 0.2), (3_000_000_000, 0.4)])
def test_the_automatic_density_goes_by_the_models_size(size: int, density: float) -> None:
    assert resolved(size).experts[0]["density"] == density
    assert resolved(size, parameters={"density": 0.7}).experts[0]["density"] == 0.7


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"parameters": {"gatefactor": 1}}, "method fim_ties has no parameter 'gatefactor': did you mean 'gate"),
    "far off": ({"parameters": {"q": 1}}, "has no parameter 'q': known: importance, theta, .*, coefficient, density"),
    "list too short": (
        {"models": ["b", "c", "d"], "parameters": {"density": [1, 1]}},
        "2 values of density for 3 fine-tuned models: give one or 3",
    ),
    "list empty": ({"parameters": {"density": []}}, "0 values of density for one fine-tuned model: give one$"),
    "list too long for one": (
        {"parameters": {"density": [0.1, 0.2]}},
        "2 values of density for one fine-tuned model: give one$",
    ),
    "list of a method's own": ({"parameters": {"theta": [1, 2]}}, "method fim_ties: theta"),
    "negative": ({"parameters": {"theta": -1}}, "theta -1: must not be negative"),
    "not finite": ({"parameters": {"gate_factor": float("inf")}}, "gate_factor: must be a finite number"),
    "beside a model": (
        {"models": [{"model": "b", "parameters": {"theta": 1}}]},
        "method fim_ties, model b: there is no 'theta'",
    ),
}


@pytest.mark.parametrize(("values", "words"), BAD.values(), ids=BAD)
def test_parameters_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        resolved(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "recipe: base is missing; models is missing"),
        ({"base": datetime.date(2024, 1, 1), "models": ["b"]}, "base: must be a text"),
        (PAIR | {"models": []}, "models: must hold at least 1"),
        (PAIR | {"models": [3]}, "models.0: must be a mapping"),
        (PAIR | {"method": 3}, "method: must be a text"),
        (PAIR | {"fisher": {"samples": 1.5}}, "fisher.samples: "),
        (PAIR | {"max_shard_bytes": None}, "max_shard_bytes None: None is not a size"),
        (PAIR | {"allow_nonfinite": "perhaps"}, "allow_nonfinite: must be true or false"),
    ],
)
def test_values_of_another_kind(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(values)


def test_off_in_a_recipe_stays_the_word(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("parameters: {norm_tolerance: off, other: on, normalize: false, x: yes}")
    values = load_recipe(tmp_path / "r.yaml")["parameters"]
    assert values == {"norm_tolerance": "off", "other": "on", "normalize": False, "x": "yes"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fimties", "did you mean 'fim_ties'"),
        ("task", "did you mean 'task_arithmetic'"),
        ("dare", "did you mean 'dare_ties'|did you mean 'dare_linear'"),
        ("TIES", "did you mean 'ties'"),
        ("xyz", "method 'xyz': there is no such method: `streammerge methods` lists them"),
        ("aim", "it is a post-step of any method: --aim"),
    ],
)
def test_an_unknown_method_names_the_nearest_and_not_all(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        make_recipe(PAIR | {"method": name})
    assert len(str(caught.value)) < 100
