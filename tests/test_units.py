"""Sizes in text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import RecipeError
from streammerge.units import format_memory, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("256MiB", 2**28),
        (" 1.5 kb ", 1500),
        ("0.5KiB", 512),
        ("1.5e9", 1_500_000_000),
        ("2e3 MB", 2 * 10**9),
        ("3TB", 3 * 10**12),
        ("1TiB", 2**40),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5G", "5 X", "-1", "-1GB", "1,5GB", "1_000", "0x10", "nan", "inf", "1e", True]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size; write for example 5GB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [0, "0", "0GB", "0.4"])
def test_a_size_is_at_least_one_byte(text: str | int) -> None:
    with pytest.raises(RecipeError, match="at least one byte"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234567, "1.23 MB"),
        (999_400, "999 KB"),
        (999_600, "1 MB"),
        (15_200_000_000, "15.2 GB"),
        (2.5e12, "2.5 TB"),
        (-2000, "-2 KB"),
    ],
)
def test_format_size(count: float, text: str) -> None:
    assert format_size(count) == text


@given(st.integers(1, 999 * 10**12))
def test_format_size_is_read_back_within_three_digits(count: int) -> None:
    assert parse_size(format_size(count)) == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(
    ("count", "text"),
    [(2**28, "256 MiB"), (2**30, "1024 MiB"), (10 * 2**30, "10.0 GiB"), (24 * 2**30 + 2**29, "24.5 GiB")],
)
def test_format_memory(count: int, text: str) -> None:
    assert format_memory(count) == text
