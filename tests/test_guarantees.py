"""docs/guarantees.md names tests that exist, and what SECURITY.md promises in figures is what the code has."""

import ast
import re
from pathlib import Path

import pytest

from streammerge import recipe, yaml_text
from streammerge.checkpoints import header, header_text, json_text, side_files

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text("utf-8")
SECURITY = " ".join((TESTS.parent / "SECURITY.md").read_text("utf-8").split())
ROWS = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| promise", "|---"))]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_promise_names_tests_that_exist(row: str) -> None:
    promise, named = row.strip("| ").split(" | ")
    found = re.findall(r"`([\w/]+\.py)::(\w+)`", named)
    assert promise and found and len(found) == named.count("`") // 2
    for path, name in found:
        nodes = ast.parse((TESTS / path).read_text()).body
        functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
        assert name in functions and name.startswith("test_"), f"{path}::{name}"


def test_every_part_has_promises() -> None:
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [part.splitlines()[0] for part in parts] == [
        *("Hostile input", "Interruption", "Verification", "Resources", "Determinism")
    ]
    assert all(part.count("\n| ") > 1 for part in parts)


def test_the_figures_of_the_security_page() -> None:
    assert (header.MAX_HEADER_BYTES, json_text.MAX_TEXT_BYTES, side_files.MAX_SIDE_BYTES) == (64e6, 64e6, 2**30)
    figures = {
        f"at most 64 MB, {header.MAX_TENSORS:,} tensors, {header.MAX_DIMENSIONS} dimensions, names of "
        f"{header_text.MAX_NAME:,} characters",
        f"at most 64 MB, {json_text.MAX_VALUES:,} values, {json_text.MAX_DEPTH} levels",
        f"{recipe._MOST_BYTES // 1000} KB and {recipe._MOST_VALUES:,} values",
    }
    assert not [text for text in figures if text not in SECURITY]
    assert yaml_text._DEEPEST == json_text.MAX_DEPTH
