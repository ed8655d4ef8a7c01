"""Responses graded by hand."""

import pytest

from streammerge.mini_l2s.grade import extract_answer, is_right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("answer 23", 23),
        ("20 / 2 = 10 . 10 + 13 = 23 . answer 23", 23),
        ("20 / 2 = 10 . check 10 * 2 = 20 ok . again 20 / 2 = 10 . so 20 , 10 . answer 10", 10),
        ("answer 7 . answer 8", 8),  # the last one counts
        ("answer 23 . so 20 , 23", 23),
        ("answer 0", 0),
        ("answer -3", -3),
        ("answer\n23", 23),
        ("", None),
        ("23", None),  # a number alone is no answer
        ("20 / 2 = 10 . 10 + 13 = 23", None),  # cut before its answer
        ("given 20 / 2 , + 13 . 20 / 2", None),
        ("answer", None),  # cut inside its answer
        ("answer 7 . 7 + 1 = 8 . answer", None),  # an answer taken back, the new one cut off
        ("answer = 23", None),
        ("answer 23.5", None),
        ("answer 23 coins", 23),
        ("answers 23", None),
        ("answer ²", None),  # a digit to str.isdigit, not to int
        ("answer 1" + "0" * 5000, None),  # int would raise
    ],
)
def test_extracted_by_hand(response: str, answer: int | None) -> None:
    assert extract_answer(response) == answer


def test_right_only_with_this_answer() -> None:
    assert is_right("10 + 13 = 23 . answer 23", 23)
    assert not is_right("10 + 13 = 23 . answer 24", 23)
    assert not is_right("10 + 13 = 23 .", 23)
