"""Strict models: one readable line for everything that is wrong, with suggestions."""

import math
from typing import Any

import pytest
from pydantic import Field, ValidationError, field_validator

from streammerge.errors import RecipeError
from streammerge.evaluation.settings import EvaluationSettings
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
    "NaN": ({"name": "x", "inner": {"width": math.nan}}, "it: inner.width: Input should be a finite number, not nan"),
    "a truth for a number": (
        {"name": "x", "inner": {"width": True}, "even": False},
        "it: inner.width: must be a number, not True; even: must be a number, not False",
    ),
    "two": ({"even": 1}, "it: name is missing; even: must be even, not 1"),
}


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
        "--temperature nan: a finite number; --seed 9223372036854775808: below 9223372036854775808; "
        "--max-new-tokens 0: at least 1"
    )
