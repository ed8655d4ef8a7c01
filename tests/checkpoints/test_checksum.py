"""The checksum of a tensor's bytes: its formula, any cut, any bit."""

import random
from itertools import pairwise

import pytest

from streammerge.checkpoints.checksum import add, part_sum

ROW = 1 << 10  # words that are summed as one row


def by_formula(data: bytes) -> int:
    """The sum in the module's docstring, in Python's integers."""
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum((2 * i + 1) * x for i, x in enumerate(words)) % 2**64


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24, 1000, 8 * ROW - 1, 8 * ROW, 8 * ROW + 3, 300 * ROW + 13])
def test_the_formula(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert part_sum(memoryview(data)) == by_formula(data)


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(draw.choice([5, 40, 3000, 8 * ROW + 100, 200 * ROW]))
    edges = sorted({0, len(data), *(draw.randrange(len(data)) for _ in range(draw.choice([1, 5, 30])))})
    parts = list(pairwise(edges))
    draw.shuffle(parts)
    total = 0
    for start, stop in parts:
        total = add(total, part_sum(memoryview(data)[start:stop], start))
    assert total == by_formula(data)


@pytest.mark.parametrize("data", [bytes(67), b"\xff" * 67, random.Random(1).randbytes(67)])
def test_every_single_bit_counts(data: bytes) -> None:
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert part_sum(memoryview(changed)) != part_sum(memoryview(data)), bit


def test_bits_far_down_count() -> None:
    data = random.Random(2).randbytes(300 * ROW)
    whole = part_sum(memoryview(data))
    for bit in random.Random(3).sample(range(8 * len(data)), 50):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert part_sum(memoryview(changed)) != whole, bit


@pytest.mark.parametrize("count", [1, 5, ROW, ROW + 3])
@pytest.mark.parametrize("places", [(0, 1), (3, 3 + ROW), (7, 2 * ROW), (0, 2 * ROW)])
def test_words_that_change_places_count(places: tuple[int, int], count: int) -> None:
    """One of them, or several in a row; those between the two places come before or behind them."""
    draw = random.Random(4)
    words = [draw.randbytes(8) for _ in range(4 * ROW)]
    first, second = places
    there = words[second : second + count]
    moved = [*words[:first], *there, *words[first:second], *words[second + count :]]
    assert moved != words and sorted(moved) == sorted(words)
    assert part_sum(memoryview(b"".join(moved))) != part_sum(memoryview(b"".join(words)))


def test_equal_pieces_that_change_places_count() -> None:
    """Of the numbers of a model few are different."""
    one, other = (random.Random(seed).choices([b"\x3f\x80", b"\xbf\x80", b"\0\0"], k=4 * ROW) for seed in (5, 6))
    words, moved = b"".join([*one, *other]), b"".join([*other, *one])
    assert part_sum(memoryview(moved)) != part_sum(memoryview(words))
