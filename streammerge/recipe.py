"""What to merge: a strict schema, its YAML form and its defaults."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator

from streammerge.calibration.store import CalibrationSettings
from streammerge.errors import RecipeError
from streammerge.fisher import DEFAULT_SHARD_BYTES
from streammerge.fisher.store import FisherSettings
from streammerge.mergekit_names import OF_RECIPE, of_parameter
from streammerge.methods import METHODS
from streammerge.methods.aim import Aim
from streammerge.methods.api import Method, ModelFacts
from streammerge.schema import Hint, Strict, build, suggest
from streammerge.units import parse_size
from streammerge.yaml_text import parse_yaml

DEFAULT_METHOD = "fim_ties"


# What is a parameter of some method, and stands where a recipe has none.
_OF_METHODS = {
    key: Hint("it is a parameter of a method: put it under 'parameters'")
    for method in METHODS.values()
    for key in (*method.Parameters.model_fields, *method.Expert.model_fields)
}


class ExpertSpec(Strict):
    """One fine-tuned model and the parameters that are its own."""

    hints: ClassVar = {**_OF_METHODS, **OF_RECIPE}

    model: str = Field(min_length=1, description="folder, org/name[@revision], or hf://org/name[@revision]")
    parameters: dict[str, Any] = Field(default_factory=dict, description="per-model parameters, e.g. coefficient")


class Recipe(Strict):
    """A merge job. Everything the output's bytes depend on, besides the input bytes, is in here."""

    hints: ClassVar = {**_OF_METHODS, **OF_RECIPE}

    base: str = Field(min_length=1, description="base model: folder, org/name[@revision], or hf://org/name[@revision]")
    models: list[ExpertSpec] = Field(min_length=1, description="fine-tuned models")
    method: str = Field(DEFAULT_METHOD, description="merge method")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the method's parameters")
    fisher: FisherSettings = Field(default_factory=lambda: build(FisherSettings, {}, "fisher"))
    fisher_from: list[str] = Field(default_factory=list, description="folders of Fishers to reuse, the base's first")
    calibration: CalibrationSettings = Field(default_factory=lambda: build(CalibrationSettings, {}, "calibration"))
    aim: float | None = Field(
        None,
        ge=0,
        le=1,
        description="omega of AIM, a post-step of any method: how much of a change is left at the base's largest "
        "activations; 0.4 is usual",
    )
    max_shard_bytes: int = Field(DEFAULT_SHARD_BYTES, ge=1, description="largest shard, e.g. 5GB")
    allow_nonfinite: bool = Field(False, description="let NaN and Inf in the inputs through")

    @property
    def named_method(self) -> str:
        """What to call the method in a message."""
        return f"method {self.method}" + (" with --aim" if self.aim is not None else "")

    @field_validator("fisher_from", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str | os.PathLike) else value

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """A fine-tuned model may be given as its name alone."""
        if not isinstance(value, list | tuple):
            return value
        return [{"model": m} if isinstance(m, str | os.PathLike) else m for m in value]

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        name = value.replace("-", "_")
        if name not in METHODS:
            begun = [method for method in METHODS if method.startswith(name.lower())] if name else []
            near = begun or difflib.get_close_matches(name.lower(), METHODS, n=1)
            known = f"did you mean {near[0]!r}?" if near else "`streammerge methods` lists them"
            known = "it is a post-step of any method: --aim" if name == "aim" else known
            raise ValueError(f"there is no such method: {known}")
        return name

    @field_validator("max_shard_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> int:
        return parse_size(value)


RecipeLike = Recipe | Mapping[str, Any] | str | os.PathLike[str]


def make_recipe(values: RecipeLike) -> Recipe:
    """Make a recipe from plain values, or from a YAML file; raises RecipeError with all that is wrong in one line."""
    if isinstance(values, Recipe):
        return values
    if isinstance(values, str | os.PathLike):
        values = load_recipe(values)
    if not isinstance(values, Mapping):
        raise RecipeError(f"recipe: give a mapping, or the path of a YAML file, not a {type(values).__name__}")
    return build(Recipe, dict(values), "recipe")


_MOST_BYTES, _MOST_VALUES = 100_000, 10_000  # of a recipe: hundreds of models with all their parameters


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the values of a YAML recipe.

    Raises:
        RecipeError: no such file, not YAML, too large, or not a mapping.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _MOST_BYTES:
        raise RecipeError(f"recipe {path}: larger than {_MOST_BYTES} bytes")
    return parse_recipe(raw, f"recipe {path}")


def parse_recipe(raw: bytes, where: str) -> dict[str, Any]:
    """The values of a YAML recipe, of which nothing is believed.

    Raises:
        RecipeError: not YAML, or not a mapping.
    """
    try:
        values = parse_yaml(raw.decode("utf-8"), _MOST_VALUES)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not valid YAML: byte {error.start + 1} is not of a text in UTF-8") from None
    except ValueError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{where}: must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    return values


@dataclass(frozen=True)
class Resolved:
    """A recipe's method with every parameter filled in."""

    method: Method
    parameters: dict[str, Any]
    experts: list[dict[str, Any]]


def resolve_method(recipe: Recipe, parameter_count: int) -> Resolved:
    """Split the recipe's parameters into the method's own and the per-model ones, and fill in defaults.

    A per-model parameter among the method's `parameters` holds for every fine-tuned model: one value for all,
    or a list with one each. What stands beside a model goes first.

    Raises:
        RecipeError: unknown or bad parameters, or a list of the wrong length.
    """
    cls = METHODS[recipe.method]
    what = f"method {recipe.method}"
    own = {key: value for key, value in recipe.parameters.items() if key not in cls.Expert.model_fields}
    shared = {key: value for key, value in recipe.parameters.items() if key in cls.Expert.model_fields}
    unknown = [key for key in own if key not in cls.Parameters.model_fields]
    if unknown:
        known = [*cls.Parameters.model_fields, *cls.Expert.model_fields]
        hint = of_parameter(unknown[0], known) or suggest(unknown[0], known)
        raise RecipeError(f"{what} has no parameter {unknown[0]!r}: {hint}")
    parameters = build(cls.Parameters, own, what)
    experts = []
    for index, spec in enumerate(recipe.models):
        for key in spec.parameters:
            if key not in cls.Expert.model_fields and (known_as := of_parameter(key, cls.Expert.model_fields)):
                raise RecipeError(f"{what}, model {spec.model}: there is no {key!r}: {known_as}")
        values = {key: _for_expert(key, value, index, recipe.models, what) for key, value in shared.items()}
        experts.append(build(cls.Expert, values | spec.parameters, f"{what}, model {spec.model}"))
    facts = ModelFacts(parameter_count, tuple(spec.model for spec in recipe.models), recipe.calibration.rows)
    method = cls(parameters, experts, facts)
    filled = [expert.model_dump() for expert in method.experts]
    return Resolved(method if recipe.aim is None else Aim(method, recipe.aim), parameters.model_dump(), filled)


def _for_expert(key: str, value: Any, index: int, models: Sequence[ExpertSpec], what: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0]
    if len(value) != len(models):
        several = len(models) > 1
        these = f"{len(models)} fine-tuned models" if several else "one fine-tuned model"
        advice = f"one or {len(models)}" if several else "one"
        raise RecipeError(f"{what}: {len(value)} values of {key} for {these}: give {advice}")
    return value[index]
