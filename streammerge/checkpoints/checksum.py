"""A checksum of a tensor's bytes that costs less than copying them, to notice that they have changed.

    sum over the 64-bit little-endian words x_i of (2 i + 1) x_i  mod 2^64

A word that is not whole is filled up with zeros. The weights are odd, so that every change of a single bit shows, and
differ from place to place, so that moved words do. It is a sum, so that the parts of a tensor may come in any order
and be cut anywhere. No protection against somebody who wants to deceive: that is SHA-256, which every shard has.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

_ROW = 1 << 10  # words
_MODULUS = 1 << 64


def part_sum(data: memoryview, start: int = 0) -> int:
    """What the bytes `data`, from byte `start` of a tensor on, add to its checksum; add up modulo 2**64."""
    import numpy

    lead = min(-start % 8, len(data))
    total = _word(data[:lead], start) if lead else 0
    words = (len(data) - lead) // 8
    index = -(-start // 8)
    if words:
        plain, weighted = _sums(numpy.frombuffer(data, "<u8", words, lead))
        total += weighted + 2 * index * plain
    if rest := data[lead + 8 * words :]:
        total += _word(rest, 8 * (index + words))
    return total % _MODULUS


def add(one: int, other: int) -> int:
    """The sum of two parts."""
    return (one + other) % _MODULUS


def _sums(values: ndarray[Any, Any]) -> tuple[int, int]:
    """The sum of the x_k, and that of (2 k + 1) x_k, each but for multiples of 2**64.

    Of the words as rows, k = _ROW r + c, the sums of rows and columns are enough: numpy adds several words at once,
    but multiplies one by one.
    """
    whole = len(values) // _ROW
    rows, rest = values[: whole * _ROW].reshape(whole, _ROW), values[whole * _ROW :]
    of_rows, of_rest = rows.sum(1), int(rest.sum())
    weighted = int(rows.sum(0).dot(_odd())) + int(rest.dot(_odd()[: len(rest)]))
    down = int(of_rows.dot(_counted(whole))) + whole * of_rest
    return int(of_rows.sum()) + of_rest, weighted + 2 * _ROW * down


def _word(data: memoryview, start: int) -> int:
    """Some bytes of one word."""
    return (int.from_bytes(data, "little") << 8 * (start % 8)) * (2 * (start // 8) + 1)


@cache
def _odd() -> ndarray[Any, Any]:
    """1, 3, 5, ..."""
    return 2 * _counted(_ROW) + 1


def _counted(count: int) -> ndarray[Any, Any]:
    import numpy

    return numpy.arange(count, dtype=numpy.uint64)
