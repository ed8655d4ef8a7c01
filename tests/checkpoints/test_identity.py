"""What two runs differ in, said so that one sees what to put back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from streammerge.checkpoints.identity import differences

OLD: dict[str, Any] = {
    "version": "0.1",
    "recipe": {
        "base": "org/base",
        "models": [{"model": "org/ft@main", "parameters": {"weight": 1.0}}],
        "parameters": {"density": 0.2, "theta": None},
    },
    "sources": [
        {"role": "base", "id": "org/base", "revision": "a" * 40, "fingerprint": "1" * 64, "files": {}},
        {"role": "expert", "id": "org/ft", "revision": "b" * 40, "fingerprint": "2" * 64, "files": {"a": [7, 1]}},
    ],
    "texts": ["3" * 64],
    "layout": "4" * 64,
}
MISSING = object()
CHANGES: dict[str, tuple[list[tuple[Any, ...]], list[str]]] = {
    "a parameter": ([("recipe", "parameters", "density", 0.5)], ["recipe.parameters.density (0.2 -> 0.5)"]),
    "one that was not given": ([("recipe", "parameters", "theta", 1)], ["recipe.parameters.theta (none -> 1)"]),
    "one that is gone": ([("recipe", "parameters", "density", MISSING)], ["recipe.parameters.density (0.2 -> none)"]),
    "of one model": (
        [("recipe", "models", 0, "parameters", "weight", 2)],
        ["recipe.models[0].parameters.weight (1.0 -> 2)"],
    ),
    "the version": ([("version", "0.2")], ["version (0.1 -> 0.2)"]),
    "the content of a model": ([("sources", 1, "fingerprint", "5" * 64)], ["expert org/ft (its tensors have changed)"]),
    "a file, where no sample was": ([("sources", 1, "files", "a", [7, 2])], ["expert org/ft (a was written to since)"]),
    "a revision": (
        [("sources", 0, "revision", "c" * 40), ("sources", 0, "fingerprint", "5" * 64)],
        ["base org/base (revision aaaaaaaaaaaa... -> cccccccccccc...)"],
    ),
    "a text": ([("texts", 0, "6" * 64)], ["texts[0] (333333333333... -> 666666666666...)"]),
    "another model": (
        [("recipe", "models", 0, "model", "org/other"), ("sources", 1, "id", "org/other")],
        ["recipe.models[0].model (org/ft@main -> org/other)"],
    ),
    "a model more": (
        [("recipe", "models", [*OLD["recipe"]["models"], {"model": "m"}]), ("sources", [*OLD["sources"], {}])],
        ["recipe.models[1] (none -> m)"],
    ),
    "two things and the layout": (
        [("layout", "7" * 64), ("version", "0.2"), ("recipe", "base", "org/new")],
        ["version (0.1 -> 0.2)", "recipe.base (org/base -> org/new)"],
    ),
    "the layout": ([("layout", "7" * 64)], ["layout"]),
    "a long value": ([("version", "8" * 99 + "9" * 99)], [f"version (0.1 -> {'8' * 50}...{'9' * 50})"]),
    "nothing that is spoken of": ([("sources", 1, "role", "base")], ["sources"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_difference_is_named(what: str) -> None:
    changes, expected = CHANGES[what]
    new = deepcopy(OLD)
    for *place, last, value in changes:
        into: Any = new
        for key in place:
            into = into[key]
        if value is MISSING:
            del into[last]
        else:
            into[last] = value
    assert differences(OLD, new) == expected


def test_a_model_that_stands_alone() -> None:
    old = {"base": {"id": "a", "revision": None, "fingerprint": "1", "files": {}}, "seed": 0}
    assert differences(old, {**old, "base": {**old["base"], "id": "b"}}) == ["base (a -> b)"]
    assert differences(old, {**old, "base": {**old["base"], "fingerprint": "2"}}) == [
        "base a (its tensors have changed)"
    ]


@pytest.mark.parametrize("hostile", [7, None, [7], [{}], {"a": 1}, [{**OLD["sources"][0], "files": 3}]])
def test_sources_that_no_run_has_written(hostile: Any) -> None:
    assert any(difference.startswith("sources") for difference in differences({**OLD, "sources": hostile}, OLD))
    assert differences({"base": hostile}, {"base": OLD["sources"][0]})
