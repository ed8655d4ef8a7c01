"""Uniform random numbers by counter: element n of a stream is a hash of (key, n), so no state and no order.

The generator is SplitMix64 read at any place: word n is the finalizer of `key + (n + 1) * gamma`, which is what
the sequential generator seeded with `key` gives as its n-th output. All arithmetic is modulo 2^64, in numpy's uint64:
torch has none, and takes half as long again. Each word gives two draws of 24 bits.

Reference: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014; the finalizer is "Mix13"
of Stafford, as in Vigna's public-domain splitmix64.c.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_24_BITS = (1 << 24) - 1


def stream_key(seed: int, tensor: str, model: int) -> int:
    """Key of the stream that belongs to one tensor of one model: the first 8 bytes of a SHA-256, as int64.

    Streams of different keys are disjoint for all practical purposes: two of 2^32 draws overlap with a
    probability of 2^-31.
    """
    digest = hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def words(key: int, first: int, count: int) -> np.ndarray:
    """The 64-bit outputs number `first` to `first + count` of SplitMix64 seeded with `key`, as uint64."""
    import numpy as np

    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    z *= np.uint64(_GAMMA)
    z += np.uint64(key % 2**64)
    shifted = np.empty_like(z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        if factor != 1:
            z *= np.uint64(factor)
    return z


def uniform(key: int, first: int, shape: Sequence[int]) -> Tensor:
    """float32 draws in [0, 1), multiples of 2^-24: numbers `first` and following of the key's stream.

    Draws 2n and 2n + 1 are bits 40 to 63 and bits 16 to 39 of word n.
    """
    import numpy as np
    import torch

    count = math.prod(shape)
    start, end = first // 2, (first + count + 1) // 2
    z = words(key, start, end - start)
    draws = np.empty((len(z), 2), dtype=np.float32)
    draws[:, 0] = (z >> np.uint64(40)).view(np.int64)  # of which it makes floats faster than of uint64
    z >>= np.uint64(16)
    z &= np.uint64(_24_BITS)
    draws[:, 1] = z.view(np.int64)
    draws *= np.float32(2.0**-24)
    skipped = first - 2 * start
    return torch.from_numpy(draws).view(-1)[skipped : skipped + count].view(tuple(shape))
