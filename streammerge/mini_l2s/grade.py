"""What a response answers, and whether that is right."""

from __future__ import annotations

import re

MARKER = "answer"


def extract_answer(response: str) -> int | None:
    """The number right after the last word `answer`; None where there is none.

    A chain that was cut before its answer has none, whatever numbers it holds; nor has one whose last `answer` is
    followed by anything but a whole number, even if an earlier one was.
    """
    words = response.split()
    if MARKER not in words:
        return None
    after = words[len(words) - words[::-1].index(MARKER) :]
    return int(after[0]) if after and re.fullmatch(r"-?[0-9]{1,9}", after[0]) else None


def is_right(response: str, answer: int) -> bool:
    """Whether the response's answer is this one."""
    return extract_answer(response) == answer
