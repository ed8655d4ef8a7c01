"""The checksum of a tensor's bytes: its formula, any cut, any bit."""

import random
from itertools import pairwise

import pytest

from streammerge.checkpoints.checksum import add, part_sum

CHUNK = 1 << 14  # words whose weights differ; then they repeat, times the next odd number


def by_formula(data: bytes) -> int:
    """The sum in the module's docstring, in Python's integers."""
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum((2 * (i % CHUNK) + 1) * (2 * (i // CHUNK) + 1) * x for i, x in enumerate(words)) % 2**64


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24, 1000, 8 * CHUNK - 1, 8 * CHUNK, 8 * CHUNK + 3, 24 * CHUNK + 13])
def test_the_formula(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert part_sum(memoryview(data)) == by_formula(data)


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(draw.choice([5, 40, 3000, 8 * CHUNK + 100, 20 * CHUNK]))
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
    data = random.Random(2).randbytes(24 * CHUNK)
    whole = part_sum(memoryview(data))
    for bit in random.Random(3).sample(range(8 * len(data)), 50):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert part_sum(memoryview(changed)) != whole, bit


def test_words_that_change_places_count() -> None:
    draw = random.Random(4)
    words = [draw.randbytes(8) for _ in range(2 * CHUNK + 5)]
    whole = part_sum(memoryview(b"".join(words)))
    for one, other in ((0, 1), (3, 3 + CHUNK), (7, 2 * CHUNK)):
        moved = list(words)
        moved[one], moved[other] = words[other], words[one]
        assert part_sum(memoryview(b"".join(moved))) != whole
