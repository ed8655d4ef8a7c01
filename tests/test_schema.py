"""Strict models: one readable line for everything that is wrong, with suggestions."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from streammerge import DiagnoseSettings, EvaluationSettings, FisherSettings, PushSettings, Recipe
from streammerge.calibration.store import CalibrationSettings
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.schema import Strict, build, build_from_options, suggest


class Inner(Strict):
    depth: int = 0
    width: float | None = None


class Outer(Strict):
    name: str
    inner: Inner = Inner()
    others: list[Inner] = Field(default_factory=list)
    maybe: Inner | None = None
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


def test_what_is_right_is_built() -> None:
    model = build(Outer, {"name": "x", "inner": {"depth": "3"}, "others": [{"width": 1}]}, "it")
    assert (model.inner.depth, model.others[0].width) == (3, 1.0)
    with pytest.raises(ValidationError):
        model.name = "y"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"name": "x", "iner": {}}, "it: there is no 'iner': did you mean 'inner'?"),
    "unknown": ({"name": "x", "q": 1}, "it: there is no 'q': known: name, inner, others, maybe, even"),
    "nested": ({"name": "x", "inner": {"dept": 1}}, "it: there is no 'inner.dept': did you mean 'depth'?"),
    "in a list": ({"name": "x", "others": [{"dept": 1}]}, "it: there is no 'others.0.dept': did you mean 'depth'?"),
    "optional": ({"name": "x", "maybe": {"widht": 1}}, "it: there is no 'maybe.widht': did you mean 'width'?"),
    "missing": ({}, "it: name is missing"),
    "own check": ({"name": "x", "even": 3}, "it: even: must be even, not 3"),
    "NaN": ({"name": "x", "inner": {"width": math.nan}}, "it: inner.width: must be a finite number, not nan"),
    "a truth for a number": (
        {"name": "x", "inner": {"width": True}, "even": False},
        "it: inner.width: must be a number, not True; even: must be a number, not False",
    ),
    "two": ({"even": 1}, "it: name is missing; even: must be even, not 1"),
}


class Kinds(Strict):
    number: float = 0
    whole: int = Field(1, ge=1, le=9)
    between: float = Field(0.5, gt=0, lt=1)
    truth: bool = False
    text: str = Field("x", min_length=1)
    path: Path = Path()
    several: list[str] = Field(["x"], min_length=1)
    fixed: tuple[str, ...] = ()
    mapping: dict[str, int] = Field(default_factory=dict)
    inner: Inner = Inner()
    choice: Literal["a", "b"] = "a"
    auto: float | Literal["auto"] = "auto"
    any_of: int | bool | None = None


WORDS: list[tuple[str, Any, str]] = [
    ("number", "x", "must be a number, not 'x'"),
    ("number", [], "must be a number, not []"),
    ("number", math.inf, "must be a finite number, not inf"),
    ("whole", "x", "must be a whole number, not 'x'"),
    ("whole", None, "must be a whole number, not None"),
    ("whole", 1.5, "must be a whole number, not 1.5"),
    ("whole", 0, "must be at least 1, not 0"),
    ("whole", 10, "must be at most 9, not 10"),
    ("between", 0, "must be above 0.0, not 0"),
    ("between", 1, "must be below 1.0, not 1"),
    ("truth", "perhaps", "must be true or false, not 'perhaps'"),
    ("truth", [], "must be true or false, not []"),
    ("text", 3, "must be a text, not 3"),
    ("text", "", "must be a text that is not empty, not ''"),
    ("path", 3, "must be a path, not 3"),
    ("several", "x", "must be a list, not 'x'"),
    ("several", [], "must hold at least 1, not []"),
    ("fixed", 3, "must be a list, not 3"),
    ("mapping", 3, "must be a mapping, not 3"),
    ("inner", 3, "must be a mapping, not 3"),
    ("choice", "c", "must be 'a' or 'b', not 'c'"),
    ("auto", "most", "must be a number or 'auto', not 'most'"),
]


@pytest.mark.parametrize(("key", "value", "words"), WORDS)
def test_it_is_said_in_plain_words(key: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(Kinds, {key: value}, "it")
    assert str(caught.value) == f"it: {key}: {words}"


def test_every_kind_of_value_of_ours_has_its_words() -> None:
    """What pydantic says itself begins with "Input should": no field of any settings lets it through."""
    settings = [Recipe, FisherSettings, DiagnoseSettings, EvaluationSettings, PushSettings, CalibrationSettings]
    settings += [schema for method in METHODS.values() for schema in (method.Parameters, method.Expert)]
    for schema in settings:
        for key in schema.model_fields:
            for value in (object(), "?", [object()], -1, 0.3, {"a": 1}, "", math.nan, None, b"\xff"):
                try:
                    build(schema, {key: value}, "it")
                except RecipeError as error:
                    assert "nput should" not in str(error), (schema, key, value)


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(Outer, values, "it")
    assert str(caught.value) == message


def test_a_huge_value_is_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        build(Outer, {"name": "x", "even": "9" * 4000}, "it")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("word", "known", "text"),
    [
        ("tie", ["ties", "linear"], "did you mean 'ties'?"),
        ("zzz", ["ties", "linear"], "known: ties, linear"),
        ("zzz", iter(["ties"]), "known: ties"),
        ("zzz", [], "known: none"),
    ],
)
def test_suggest(word: str, known: Any, text: str) -> None:
    assert suggest(word, known) == text


def test_what_is_wrong_with_options_is_told_by_their_names() -> None:
    with pytest.raises(RecipeError) as caught:
        build_from_options(EvaluationSettings, {"max_new_tokens": "0", "temperature": "nan", "seed": str(2**63)})
    assert str(caught.value) == (
        "--temperature nan: must be a finite number; --seed 9223372036854775808: must be below 9223372036854775808; "
        "--max-new-tokens 0: must be at least 1"
    )
