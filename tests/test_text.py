"""What is shown is printable, and says what was there."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import errors
from streammerge.text import all_visible, visible

SEEN = {
    "plain name": "plain name",
    "é\u6f22": "é\u6f22",
    "\x1b[31mred": "\\x1b[31mred",
    "a\nb\r\t": "a\\nb\\r\\t",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\u200b\ufeff\u00a0\u2028\x85\x9b": "\\u200b\\ufeff\\xa0\\u2028\\x85\\x9b",
    "\ud800\0": "\\ud800\\x00",
    "\U000e0041": "\\U000e0041",
}


@pytest.mark.parametrize(("text", "shown"), SEEN.items(), ids=map(str, range(len(SEEN))))
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters()))
def test_it_is_printable_and_nothing_is_lost(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    if "\\" not in text and '"' not in text:
        assert ast.literal_eval(f'"{shown}"') == text


def test_structures() -> None:
    assert all_visible({"a\n": ["\x1b", ("b", 1, None)]}) == {"a\\n": ["\\x1b", ["b", 1, None]]}


@pytest.mark.parametrize(
    "error", [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
)
def test_every_error_of_ours_has_a_message_that_can_be_shown(error: type[errors.StreammergeError]) -> None:
    evil = "model \x1b[2J\nstreammerge: all is well\u202e"
    if issubclass(error, errors.IncompatibleCheckpointsError):
        message = str(error(evil, [evil, evil]))
        assert len(message.split("\n")) == 3
    else:
        message = str(error(evil))
        assert "\n" not in message
    assert all(line.isprintable() for line in message.split("\n"))
    assert "model \\x1b[2J\\nstreammerge" in message
