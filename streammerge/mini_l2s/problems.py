"""Arithmetic word problems of several steps, drawn by a seed, and the ways of answering them: from terse to long.

A problem is in one of three splits by a hash of its structure, which is the start and all operations with their
numbers, without names and things: no held-out structure is ever drawn for training, whatever the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

Split = Literal["train", "validation", "heldout"]

LARGEST = 49
"""Every number of a problem, and on the way to its answer, is between 0 and this."""

STEPS = range(2, 6)
"""How many steps a problem has."""

SCORED = 250
"""How many problems are scored, or fewer: a standard error of at most 3.2 points."""

SCORED_SEED = 1
"""Of the problems that are scored, the same for every model. Those of seed 0 were seen while the training was tuned."""

PEOPLE = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom", "Uma", "Zoe")
THINGS = ("apples", "beads", "cards", "coins", "eggs", "nuts", "pens", "shells")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
CLAUSES = {"+": "gets {n}", "-": "gives {n}", "*": "makes times {n}", "/": "keeps one in {n}"}
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


@dataclass(frozen=True)
class Step:
    """One operation on what there is so far."""

    sign: str
    number: int

    def result(self, value: int) -> int | None:
        """What it makes of a value; None where that is no whole number from 0 to LARGEST."""
        if self.sign == "/" and value % self.number:
            return None
        result = {
            "+": value + self.number,
            "-": value - self.number,
            "*": value * self.number,
            "/": value // self.number,
        }[self.sign]
        return result if 0 <= result <= LARGEST else None


@dataclass(frozen=True)
class Problem:
    """Somebody has some things, then one step after another; how many are there in the end?"""

    person: str
    thing: str
    start: int
    steps: tuple[Step, ...]

    @property
    def values(self) -> list[int]:
        """What there is at the start and after each step."""
        values = [self.start]
        for step in self.steps:
            result = step.result(values[-1])
            assert result is not None
            values.append(result)
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def question(self) -> str:
        clauses = [f"has {self.start} {self.thing}"]
        for ordinal, step in zip(ORDINALS, self.steps, strict=False):
            clauses.append(f"{ordinal} {CLAUSES[step.sign].format(n=step.number)}")
        return f"{self.person} {' , '.join(clauses)} . how many {self.thing} ?"

    @property
    def structure(self) -> str:
        return " ".join([str(self.start), *(f"{step.sign}{step.number}" for step in self.steps)])

    @property
    def split(self) -> Split:
        """By the hash of the structure: of 20 one is held out, one for validation, the others are for training."""
        share = int.from_bytes(hashlib.sha256(self.structure.encode()).digest()[:8], "big") % 20
        return "heldout" if share == 0 else "validation" if share == 1 else "train"


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """Problems of one split, without end."""
    draw = Random(f"{split} {seed}")
    while True:
        problem = _draw_problem(draw)
        if problem.split == split:
            yield problem


def scored_problems(limit: int | None = None, split: Split = "heldout") -> list[Problem]:
    """The problems that every model is scored on: SCORED in a fixed order, or only the first so many of them."""
    return list(islice(problems(split, SCORED_SEED), SCORED if limit is None else min(limit, SCORED)))


def _draw_problem(draw: Random) -> Problem:
    start = draw.randint(2, LARGEST // 2)
    steps: list[Step] = []
    value = start
    count = draw.choice(STEPS)
    while len(steps) < count:
        sign = draw.choice("+-*/")
        step = Step(sign, draw.randint(2, 9) if sign in "+-" else draw.randint(2, 3))
        result = step.result(value)
        if result is not None and result >= 1:
            steps.append(step)
            value = result
    return Problem(draw.choice(PEOPLE), draw.choice(THINGS), start, tuple(steps))


@dataclass(frozen=True)
class Style:
    """How likely each part of a response is; each is decided on its own, so that a merge can keep some and drop others.

    Args:
        terse: the answer alone, by the number of steps.
        restate: the numbers and operations of the problem before the first step.
        check: after a step, by its sign, the inverse operation.
        again: after a check, by the step's sign, the step once more.
        recap: all values before the answer.
    """

    terse: Mapping[int, float]
    restate: float
    check: Mapping[str, float]
    again: Mapping[str, float]
    recap: float


BASE = Style(
    terse={2: 0.75, 3: 0.7, 4: 0.65, 5: 0.6},
    restate=0.15,
    check={"+": 0.05, "-": 0.1, "*": 0.15, "/": 0.2},
    again={"+": 0.1, "-": 0.2, "*": 0.3, "/": 0.4},
    recap=0.15,
)
"""Tersely, the likelier the fewer steps; else mostly a short chain, one equation per step."""

LONG = Style(
    terse=dict.fromkeys(STEPS, 0.05),
    restate=0.85,
    check=dict.fromkeys("+-*/", 0.85),
    again=dict.fromkeys("+-*/", 0.75),
    recap=0.85,
)
"""Mostly every part there is."""


def response(problem: Problem, style: Style, draw: Random) -> str:
    """A right response in a style."""
    end = f"answer {problem.answer}"
    if draw.random() < style.terse[len(problem.steps)]:
        return end
    parts = []
    if draw.random() < style.restate:
        told = " , ".join([str(problem.start), *(f"{step.sign} {step.number}" for step in problem.steps)])
        parts.append(f"given {told} .")
    values = problem.values
    for ordinal, before, step, after in zip(ORDINALS, values, problem.steps, values[1:], strict=False):
        parts.append(f"{ordinal} {before} {step.sign} {step.number} = {after} .")
        if draw.random() < style.check[step.sign]:
            parts.append(f"check {after} {INVERSE[step.sign]} {step.number} = {before} ok .")
            if draw.random() < style.again[step.sign]:
                parts.append(f"again {before} {step.sign} {step.number} = {after} .")
    if draw.random() < style.recap:
        parts.append(f"so {' , '.join(map(str, values))} .")
    return " ".join([*parts, end])
