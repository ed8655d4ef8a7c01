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
    "a control character": ("a: \x1b", "special characters"),
}


@pytest.mark.parametrize("text", GOOD)
def test_plain_values_are_what_pyyaml_reads(text: str) -> None:
    assert parse_yaml(text, 1000) == yaml.safe_load(text)


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_yaml(text, 1000)


def test_as_many_values_as_are_allowed() -> None:
    assert len(parse_yaml("[" + "1," * 999 + "]", 1000)) == 999
