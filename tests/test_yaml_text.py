"""YAML from strangers: what it may be is what PyYAML makes of it, and no more than that many values."""

import pytest
import yaml

from streammerge.yaml_text import parse_yaml

GOOD = ["a: 1", "- a\n- [b, {c: 1.5}]", "x: &x [1, 2]\ny: *x\nz: {<<: {k: v}, l: null}", "", "a: 2024-01-02", "'on'"]
NINE = ", ".join(["{}"] * 9)
LAUGHS = (
    "a0: [x]\n" + "a1: &a1 [x]\n" + "".join(f"a{i}: &a{i} [{NINE.format(*[f'*a{i - 1}'] * 9)}]\n" for i in range(2, 7))
)
BAD = {
    "aliases of aliases": (LAUGHS, "more than 1000 values"),
    "many values": ("[" + "1," * 1000 + "]", "more than 1000 values"),
    "an alias within itself": ("a: &a [*a]", "refers to itself"),
    "an object": ("a: !!python/object/apply:os.getcwd []", "tag"),
    "a tag that PyYAML trips over": ("a: !!int ''", "tag"),
    "open brackets": ("[" * 51, "nested more than 50 deep"),
    "nested blocks": ("- " * 51 + "a", "nested more than 50 deep"),
    "a long number": ("a: " + "1" * 101, "a number of 101 characters"),
    "a key twice": ("a: {b: 1, b: 2}", "given twice"),
    "a date that is none": ("a: 2024-99-99", "month"),
    "a control character": ("a: \x1b", r"^line 1, column 4: the character U\+001B cannot stand in a text$"),
}


@pytest.mark.parametrize("text", GOOD)
def test_plain_values_are_what_pyyaml_reads(text: str) -> None:
    assert parse_yaml(text, 1000) == yaml.safe_load(text)


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_yaml(text, 1000)


# Text, and where its flaw is: counted by hand, from 1.
FLAWS = {
    "a tab": ("base: a\nmodels:\n\t- b\n", 3, 1, "a tab cannot stand at the start: use blanks"),
    "two keys in a line": ("a: b: c", 1, 5, "a second `key: value` in a line, or one indented unlike the lines above"),
    "indented more": ("a: 1\n b: 2\n", 2, 3, "a second `key: value` in a line, or one indented unlike the lines above"),
    "indented less": ("a:\n  - b\n - c\n", 3, 2, "indented unlike the lines above"),
    "an open bracket": ("base: [1\n", 1, 7, "a bracket is not closed"),
    "an open quotation": ("a: 1\nb: 'x\n", 2, 4, "a quotation mark is not closed"),
    "no colon": ("base: a\nmodels\n  - b\n", 2, 1, "a line that is no `key: value`: is a colon missing"),
    "an odd character": ("a: 1\nb: @x", 2, 4, "a value that begins with such a character goes into quotes"),
    "a star": ("a: *.weight", 1, 4, "a value that begins with * or & goes into quotes"),
    "a key twice": ("a: 1\nb: 2\na: 3", 3, 1, "'a' is given twice"),
    "a tag": ("a: !!int ''", 1, 4, "the tag"),
    "an alias within itself": ("a: &a [*a]", 1, 8, "'a' refers to itself"),
    "a control character": ("a: 1\r\nb: \x07", 2, 4, "the character U+0007"),
    "something else": ("a: {b: 1\nc: 2}", 2, 2, "expected ',' or '}', but got ':'"),
}


@pytest.mark.parametrize(("text", "line", "column", "words"), FLAWS.values(), ids=FLAWS)
def test_where_a_flaw_is_and_what_to_do(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(ValueError, match="^line ") as caught:
        parse_yaml(text, 1000)
    told = str(caught.value)
    assert told.startswith(f"line {line}, column {column}: {words}")
    assert "unicode string" not in told and told.isprintable()
    with pytest.raises(ValueError, match="^") as placeless:
        parse_yaml(text, 1000, place=False)
    assert f"line {line}, column {column}: {placeless.value}" == told


def test_as_many_values_as_are_allowed() -> None:
    assert len(parse_yaml("[" + "1," * 999 + "]", 1000)) == 999
