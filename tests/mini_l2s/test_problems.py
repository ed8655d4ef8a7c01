"""The problems, their splits and the ways of answering them."""

import re
from collections import Counter
from fractions import Fraction
from itertools import islice
from random import Random

import pytest

from streammerge.mini_l2s.grade import extract_answer
from streammerge.mini_l2s.problems import BASE, LONG, ORDINALS, STEPS, Problem, Split, Step, Style, problems, response
from streammerge.mini_l2s.tokenizer import make_tokenizer, vocabulary

COINS = Problem("Tom", "coins", 20, (Step("/", 2), Step("+", 3), Step("*", 3), Step("-", 9)))
SIGNS = "+-*/"
TERSE = Style(dict.fromkeys(STEPS, 1), 0, {}, {}, 0)
SHORT = Style(dict.fromkeys(STEPS, 0), 0, dict.fromkeys(SIGNS, 0), dict.fromkeys(SIGNS, 0), 0)
FULL = Style(dict.fromkeys(STEPS, 0), 1, dict.fromkeys(SIGNS, 1), dict.fromkeys(SIGNS, 1), 1)
SPLITS: list[Split] = ["train", "validation", "heldout"]


def drawn(split: Split, count: int, seed: int = 0) -> list[Problem]:
    return list(islice(problems(split, seed), count))


def test_a_problem_by_hand() -> None:
    assert COINS.question == (
        "Tom has 20 coins , first keeps one in 2 , second gets 3 , third makes times 3 , fourth gives 9 . "
        "how many coins ?"
    )
    assert COINS.values == [20, 10, 13, 39, 30]
    assert COINS.answer == 30
    assert COINS.structure == "20 /2 +3 *3 -9"


def test_responses_by_hand() -> None:
    draw = Random(0)
    two = Problem("Tom", "coins", 20, (Step("/", 2), Step("+", 3)))
    assert response(two, TERSE, draw) == "answer 13"
    assert response(two, SHORT, draw) == "first 20 / 2 = 10 . second 10 + 3 = 13 . answer 13"
    assert response(two, FULL, draw) == (
        "given 20 , / 2 , + 3 . "
        "first 20 / 2 = 10 . check 10 * 2 = 20 ok . again 20 / 2 = 10 . "
        "second 10 + 3 = 13 . check 13 - 3 = 10 ok . again 10 + 3 = 13 . "
        "so 20 , 10 , 13 . answer 13"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_number_is_whole_and_known(split: Split) -> None:
    """Recomputed from the question's words alone, in fractions."""
    for problem in drawn(split, 500):
        value = Fraction(re.match(r"\w+ has (\d+)", problem.question)[1])
        for verb, number in re.findall(r"(gets|gives|makes times|keeps one in) (\d+)", problem.question):
            n = int(number)
            value = {"gets": value + n, "gives": value - n, "makes times": value * n, "keeps one in": value / n}[verb]
            assert value.denominator == 1 and 1 <= value <= 49
        assert value == problem.answer
        assert 2 <= len(problem.steps) <= 5


def test_every_response_answers_right_and_every_equation_holds() -> None:
    draw = Random(1)
    for problem in drawn("train", 300):
        for style in (TERSE, SHORT, FULL, BASE, LONG):
            text = response(problem, style, draw)
            assert extract_answer(text) == problem.answer
            for a, sign, b, c in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
                x, y = Fraction(a), Fraction(b)
                assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign] == int(c)


def test_no_structure_is_in_two_splits() -> None:
    """Not even with other names and things, or another seed."""
    structures = {split: {p.structure for seed in (0, 1) for p in drawn(split, 2000, seed)} for split in SPLITS}
    for one, other in [("train", "validation"), ("train", "heldout"), ("validation", "heldout")]:
        assert not structures[one] & structures[other]


def test_the_split_depends_on_the_structure_alone() -> None:
    assert {Problem(who, what, 20, COINS.steps).split for who in ("Tom", "Eva") for what in ("coins", "pens")} == {
        COINS.split
    }
    # By `printf "12 *2 +45" | sha256sum`, the first 16 digits modulo 20: a published split must not move.
    splits = {n: Problem("Tom", "coins", 12, (Step("*", 2), Step("+", n))).split for n in (45, 8, 22, 9)}
    assert splits == {45: "heldout", 8: "validation", 22: "validation", 9: "train"}
    shares = Counter(p.split for seed in (0, 1) for split in SPLITS for p in drawn(split, 10, seed))
    assert shares == {"train": 20, "validation": 20, "heldout": 20}


def test_a_seed_repeats_and_another_does_not() -> None:
    assert drawn("heldout", 50) == drawn("heldout", 50)
    assert drawn("heldout", 50) != drawn("heldout", 50, seed=1)


@pytest.mark.parametrize("style", [BASE, LONG])
def test_a_style_is_as_likely_as_it_says(style: Style) -> None:
    """Counted in what is written; the tolerance is over three standard errors of the rarest."""
    draw = Random(2)
    written = [(p, response(p, style, draw)) for p in drawn("train", 4000)]
    terse = Counter(len(p.steps) for p, text in written if text == f"answer {p.answer}")
    asked = Counter(len(p.steps) for p, _ in written)
    assert {steps: terse[steps] / asked[steps] for steps in STEPS} == pytest.approx(style.terse, abs=0.06)
    chains = [text for _, text in written if "=" in text]
    assert sum(text.startswith("given") for text in chains) / len(chains) == pytest.approx(style.restate, abs=0.04)
    assert sum(" so " in text for text in chains) / len(chains) == pytest.approx(style.recap, abs=0.04)
    equations = re.findall(r"(check|again|) ?\d+ ([-+*/]) \d+ =", re.sub("|".join(ORDINALS), "", " ".join(chains)))
    count = Counter(equations)
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}
    checks = {sign: count["check", inverse[sign]] / count["", sign] for sign in SIGNS}
    assert checks == pytest.approx(style.check, abs=0.04)
    again = {sign: count["again", sign] / count["check", inverse[sign]] for sign in SIGNS}
    assert again == pytest.approx(style.again, abs=0.12)


def test_the_tokenizer_knows_every_word() -> None:
    draw = Random(3)
    tokenizer = make_tokenizer()
    for problem in drawn("train", 200):
        text = f"{problem.question} {response(problem, FULL, draw)}"
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())  # one token per word, and nothing around them
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert sorted(vocabulary().values()) == list(range(len(vocabulary())))
    assert len(tokenizer) == len(vocabulary())
