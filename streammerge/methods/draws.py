"""Uniform random numbers by counter: element n of a stream is a hash of (key, n), so no state and no order.

The generator is SplitMix64 read at any place: word n is the finalizer of `key + (n + 1) * gamma`, which is what
the sequential generator seeded with `key` gives as its n-th output. All arithmetic is modulo 2^64, in int64 tensors
(two's complement wraps the same on every device). Each word gives two draws of 24 bits.

Reference: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014; the finalizer is "Mix13"
of Stafford, as in Vigna's public-domain splitmix64.c.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_24_BITS = (1 << 24) - 1


def stream_key(seed: int, tensor: str, model: int) -> int:
    """Key of the stream that belongs to one tensor of one model: the first 8 bytes of a SHA-256, as int64.

    Streams of different keys are disjoint for all practical purposes: two of 2^32 draws overlap with a
    probability of 2^-31.
    """
    digest = hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def words(key: int, first: int, count: int, device: Any = None) -> Tensor:
    """The 64-bit outputs number `first` to `first + count` of SplitMix64 seeded with `key`, as int64."""
    import torch

    z = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z.mul_(_GAMMA).add_(key)
    shifted = torch.empty_like(z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        shifted.bitwise_and_((1 << (64 - shift)) - 1)  # the shift of int64 drags the sign along
        z.bitwise_xor_(shifted)
        if factor != 1:
            z.mul_(factor)
    return z


def uniform(key: int, first: int, shape: Sequence[int], device: Any = None) -> Tensor:
    """float32 draws in [0, 1), multiples of 2^-24: numbers `first` and following of the key's stream.

    Draws 2n and 2n + 1 are bits 40 to 63 and bits 16 to 39 of word n.
    """
    import torch

    count = math.prod(shape)
    start, end = first // 2, (first + count + 1) // 2
    z = words(key, start, end - start, device)
    draws = torch.empty(len(z), 2, dtype=torch.float32, device=device)
    draws[:, 0] = (z >> 40).bitwise_and_(_24_BITS)
    draws[:, 1] = (z >> 16).bitwise_and_(_24_BITS)
    skipped = first - 2 * start
    return draws.mul_(2.0**-24).view(-1)[skipped : skipped + count].view(tuple(shape))
