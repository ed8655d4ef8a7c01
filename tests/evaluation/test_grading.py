"""Answers graded by hand, and votes counted by hand."""

import pytest

from streammerge.evaluation.grading import (
    find_answer,
    find_mini_l2s_answer,
    grade,
    is_right,
    process_mini_l2s,
    process_results,
)
from streammerge.evaluation.problems import last_box


def right(response: str, gold: str) -> bool:
    return is_right(find_answer(response), gold)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        # fractions and decimals
        (r"so \boxed{0.5}.", r"\frac{1}{2}"),
        (r"\boxed{1/2}", r"\frac{1}{2}"),
        (r"$\boxed{\dfrac34}$", r"\frac{3}{4}"),
        (r"\boxed{-\frac12}", r"$-\frac{1}{2}$"),
        (r"\boxed{18.00}", "18"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{\$18}", "18"),
        # units, degrees, percent
        (r"\boxed{5\text{ cm}}", "5"),
        (r"\boxed{5}", r"5 \text{ cm}"),
        (r"\boxed{5 \mathrm{~cm}^2}", "5"),
        (r"\boxed{90}", r"90^\circ"),
        (r"\boxed{50\%}", r"50\%"),
        # powers of ten, as the MIT problems write them
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33"),
        (r"\boxed{4.5e33}", r"4.5 \times 10^{33}"),
        (r"\boxed{10^{-5}}", "1e-5"),
        # intervals, sets, pairs, matrices
        (r"\boxed{[0, 5)}", "[0,5)"),
        (r"\boxed{(-\infty, 2] \cup (3, \infty)}", r"(-\infty,2]\cup(3,\infty)"),
        (r"\boxed{2, 1}", "1,2"),
        (r"\boxed{7 \text{ and } -1}", "-1, 7"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        # expressions, equations, words
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}"),
        (r"\boxed{x = 3}", "3"),
        (r"\boxed{y = 2x + 1}", "$y=2x+1$"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{true}", "True"),
        (r"\boxed{\text{Yes}}", "yes"),
        # the last box counts, however many; also one that is not closed
        (r"first \boxed{11}, wait, \boxed{12}", "12"),
        (r"\boxed{12} \text{ or } \boxed{\frac{1}{2}} as was to be shown.}", r"\frac{1}{2}"),
        (r"\fbox{12}", "12"),
        (r"therefore \boxed{12", "12"),
        # no box: what is said to be the answer, else the last formula or number
        ("The answer is 7.", "7"),
        ("Final answer is $4$. I hope it is correct.", "4"),
        ("We get 3 + 4 = 7", "7"),
        ("so $x = 7$", "7"),
        # cut in the middle: still graded by its last number, as in the papers' toolkit
        ("First 3 times 4 is 12, then we take", "12"),
    ],
)
def test_right(response: str, gold: str) -> None:
    assert right(response, gold)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
        (r"\boxed{0.333}", r"\frac{1}{3}"),
        (r"\boxed{2 \times 10^{-5}}", "1e-5"),
        (r"\boxed{(0, 5)}", "[0,5)"),
        (r"\boxed{\text{No}}", "yes"),
        (r"\boxed{2.0001}", "2"),
        # the last box counts, also against a right one before it; and a wrong box against a right number after it
        (r"first \boxed{11}, wait, \boxed{12}", "11"),
        (r"\boxed{3}, but with 4", "4"),
        # an empty box is no answer, whatever else is there
        (r"It is 4: \boxed{}", "4"),
        # cut before there is any answer
        ("Let us think about", "4"),
        ("", "4"),
        ("First 3 times 4 is 12, then we take 5 from", "7"),
        (r"therefore \boxed{1", "12"),
    ],
)
def test_wrong(response: str, gold: str) -> None:
    assert not right(response, gold)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("answer 12", "12"),
        ("5 + 7 = 12 . so 5 , 12 answer 12", "12"),
        ("answer 3 again answer 4", "4"),
        ("5 + 7 = 12 . so 5 , 12", None),
        ("5 + 7 = 12 . answer", None),
        ("answer 12 . check answer", None),
        ("", None),
    ],
)
def test_answers_to_the_small_problems(response: str, answer: str | None) -> None:
    found = find_mini_l2s_answer(response)
    assert (found and found.text) == answer
    doc = {"question": "?", "answer": answer or "12"}
    assert process_mini_l2s(doc, [response])["accuracy"] == (answer is not None)


def test_the_right_answer_goes_first_to_math_verify() -> None:
    """It is not symmetric."""
    calls = []

    def verify(gold: object, target: object, **options: object) -> bool:
        calls.append((gold, target))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.evaluation.grading.verify", verify)
        assert not right(r"\boxed{8}", "7")
    ((gold, target),) = calls
    assert (gold[0], target[0]) == (7, 8)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{a{b}c} d}", "a{b}c"),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2"),
        (r"\boxed{1} \boxed{2} \fbox{3} \boxed{4}!", "4"),
        (r"\boxed{}", ""),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_what_takes_too_long_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number has 370 million digits."""
    monkeypatch.setattr("streammerge.evaluation.grading._SECONDS", 1)
    assert not right(r"\boxed{9^{9^{9}}}", "12")


BOX = r"so \boxed{{{}}}"


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["1", "2", "2", "1"], "1"),  # of equal counts what was seen first
        (["2", "1", "1", "2", "3"], "2"),
        (["3", "2", "1"], "3"),
        ([r"\frac12", "0.5", "2", "3", "2"], r"\frac{1}{2}"),  # written in two ways, counted as one; seen first
        (["", "", "4"], "4"),  # what has no answer does not vote
        (["", ""], None),
    ],
)
def test_votes(answers: list[str], winner: str | None) -> None:
    responses = [BOX.format(answer) for answer in answers]
    found, _, _ = grade(responses, "99")
    assert [answer is None for answer in found] == [answer == "" for answer in answers]
    for gold in ("1", "2", "3", "4", r"\frac{1}{2}"):
        _, right, elected = grade(responses, gold)
        assert elected == (winner == gold), gold
        assert right == [is_right(find_answer(response), gold) for response in responses]


def test_the_metrics_of_the_harness() -> None:
    doc = {"question": "?", "answer": "2"}
    assert process_results(doc, [r"\boxed{2}"]) == {"accuracy": 1.0, "sample_accuracy": 1.0}
    sampled = [[BOX.format(answer) for answer in ("1", "2", "2", "3")]]
    assert process_results(doc, sampled) == {"accuracy": 1.0, "sample_accuracy": 0.5}
    tied = [[BOX.format(answer) for answer in ("1", "2", "2", "1")]]
    assert process_results(doc, tied) == {"accuracy": 0.0, "sample_accuracy": 0.5}
