"""Answers found in responses, graded by math-verify; and votes. The task files name `process_results`.

math-verify bounds the time of an answer by a signal, so that all this runs in the main thread only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from math_verify import parse, verify

from streammerge.evaluation.problems import last_box

_SECONDS = 5  # for reading an answer, and for comparing two
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?)[eE]([+-]?\d+)(?![\w.])")
_IN_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")


@dataclass(frozen=True)
class Answer:
    """An answer found in a response.

    Attributes:
        text: what votes are counted by: the answer as math-verify normalises it, without blanks.
        plain: the answer as it was written.
        parsed: what math-verify makes of it.
    """

    text: str
    plain: str
    parsed: Sequence[Any]


def grader() -> str:
    """Name and version of what grades."""
    return f"math-verify {version('math-verify')}"


def find_answer(response: str) -> Answer | None:
    r"""The answer in the last \boxed{}; in a response without one what math-verify finds, at last the last number.

    An empty box is no answer. 4.5e33 is read as 4.5 \times 10^{33}, which math-verify would take for a product with e.
    """
    box = last_box(response)
    if box is not None:
        return _read(box)
    parsed = parse(_scientific(response), parsing_timeout=_SECONDS)
    return Answer("".join(str(parsed[-1]).split()), str(parsed[-1]), parsed) if parsed else None


def find_mini_l2s_answer(response: str) -> Answer | None:
    """The word right after the last `answer`, as the small problems are answered: a chain that was cut has none."""
    words = response.split()
    places = [place for place, word in enumerate(words[:-1]) if word == "answer"]
    return _read(words[places[-1] + 1]) if places and words[-1] != "answer" else None


FINDERS: Mapping[str, Callable[[str], Answer | None]] = {"mini_l2s": find_mini_l2s_answer}
"""By task, what finds its answers; `find_answer` where nothing else is said."""


def is_right(answer: Answer | None, gold: str) -> bool:
    """Whether an answer is right: as a text, case apart, or by math-verify, which takes the right one first."""
    right = _read(gold)
    if answer is None or right is None:
        return False
    if _words(answer.plain) == _words(right.plain):
        return True
    return bool(verify(right.parsed, answer.parsed, timeout_seconds=_SECONDS))


def vote(answers: Sequence[Answer | None]) -> int | None:
    """The place of the first of the answers that most responses give; among equals the one that came first wins.

    Responses without an answer do not vote. None where none has one. Answers are the same if their texts are.
    """
    counts = Counter(answer.text for answer in answers if answer is not None)
    if not counts:
        return None
    (winner, _), *_ = counts.most_common(1)  # of equal counts the first counted, so the first seen
    return next(place for place, answer in enumerate(answers) if answer is not None and answer.text == winner)


def grade(
    responses: Sequence[str], gold: str, find: Callable[[str], Answer | None] = find_answer
) -> tuple[list[str | None], list[bool], bool]:
    """Of several responses to one problem: their answers, whether each is right, and whether their vote is."""
    answers = [find(response) for response in responses]
    right = [is_right(answer, gold) for answer in answers]
    place = vote(answers)
    return [None if answer is None else answer.text for answer in answers], right, place is not None and right[place]


def process_results(
    doc: Mapping[str, str], results: Sequence[Any], find: Callable[[str], Answer | None] = find_answer
) -> dict[str, float]:
    """What lm-evaluation-harness asks of a task: the metrics of one problem, from its one response or list of them."""
    (responses,) = results
    _, right, elected = grade([responses] if isinstance(responses, str) else responses, doc["answer"], find)
    return {"accuracy": float(elected), "sample_accuracy": sum(right) / len(right)}


def process_mini_l2s(doc: Mapping[str, str], results: Sequence[Any]) -> dict[str, float]:
    """`process_results` of the small problems."""
    return process_results(doc, results, find_mini_l2s_answer)


def _read(latex: str) -> Answer | None:
    plain = latex.strip()
    if not plain:
        return None
    parsed = parse(f"\\boxed{{{_scientific(plain)}}}", parsing_timeout=_SECONDS) or [plain]
    return Answer("".join(str(parsed[-1]).split()), plain, parsed)


def _scientific(text: str) -> str:
    return _EXPONENT.sub(lambda match: f"{match[1]} \\times 10^{{{int(match[2])}}}", text)


def _words(text: str) -> str:
    return _IN_TEXT.sub(r"\1", text).strip(" .$").casefold()
