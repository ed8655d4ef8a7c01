"""A checksum of a tensor's bytes that costs about as much as looking at them, to notice that they have changed.

    sum over the 64-bit little-endian words x_i of (2 i' + 1) (2 c + 1) x_i  mod 2^64,    i = c * 2^14 + i'

A word that is not whole is filled up with zeros. The weights are odd, so that every change of a single bit shows, and
differ from place to place, so that moved words do. It is a sum, so that the parts of a tensor may come in any order
and be cut anywhere. No protection against somebody who wants to deceive: that is SHA-256, which every shard has.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

_CHUNK = 1 << 14  # words
_MODULUS = 1 << 64


def part_sum(data: memoryview, start: int = 0) -> int:
    """What the bytes `data`, from byte `start` of a tensor on, add to its checksum; add up modulo 2**64."""
    import numpy

    lead = min(-start % 8, len(data))
    total = _word(data[:lead], start) if lead else 0
    words = (len(data) - lead) // 8
    index = -(-start // 8)
    if words:
        values = numpy.frombuffer(data, "<u8", words, lead)
        edges = [index, *range((index // _CHUNK + 1) * _CHUNK, index + words, _CHUNK), index + words]
        for first, stop in pairwise(edges):
            weights = _weights()[first % _CHUNK : first % _CHUNK + stop - first]
            total += int(values[first - index : stop - index].dot(weights)) * (2 * (first // _CHUNK) + 1)
    if rest := data[lead + 8 * words :]:
        total += _word(rest, 8 * (index + words))
    return total % _MODULUS


def add(one: int, other: int) -> int:
    """The sum of two parts."""
    return (one + other) % _MODULUS


def _word(data: memoryview, start: int) -> int:
    """Some bytes of one word."""
    index = start // 8
    weight = (2 * (index % _CHUNK) + 1) * (2 * (index // _CHUNK) + 1)
    return (int.from_bytes(data, "little") << 8 * (start % 8)) * weight


@cache
def _weights() -> ndarray[Any, Any]:
    import numpy

    return numpy.arange(1, 2 * _CHUNK, 2, dtype=numpy.uint64)
