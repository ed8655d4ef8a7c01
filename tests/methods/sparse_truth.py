"""What the methods that thin task vectors out should give, in memory and from scratch: draws, combinations, models."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from methods.driver import Models
from torch import Tensor

MASK = (1 << 64) - 1


def splitmix64(seed: int) -> Iterator[int]:
    """The sequential generator, in Python's integers."""
    state = seed & MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def naive_draws(seed: int, tensor: str, model: int, shape: Sequence[int]) -> Tensor:
    """Two draws of 24 bits from each word, the high one first."""
    digest = hashlib.sha256(b"%d\n%d\n%s" % (seed, model, tensor.encode())).digest()
    generator = splitmix64(int.from_bytes(digest[:8], "little"))
    draws: list[float] = []
    while len(draws) < torch.Size(shape).numel():
        word = next(generator)
        draws += [(word >> 40) / 2**24, (word >> 16) % 2**24 / 2**24]
    return torch.tensor(draws[: torch.Size(shape).numel()], dtype=torch.float32).reshape(shape)


def combine(
    vectors: Sequence[Tensor], coefficients: Sequence[float], elect: bool, normalize: bool, scale: float
) -> Tensor:
    """Scaled and summed; with `elect`, only what has the sign of the sum, zero counting as +."""
    ys = torch.stack([c * v.float() for v, c in zip(vectors, coefficients, strict=True)])
    weights = torch.tensor(coefficients).view(-1, *[1] * (ys.dim() - 1)).expand(ys.shape)
    used = torch.ones_like(ys, dtype=torch.bool)
    if elect:
        positive = ys.sum(0) >= 0
        used = torch.where(positive, ys > 0, ys < 0)
    total = (ys * used).sum(0)
    if normalize:
        divisor = (weights * used).sum(0)
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return scale * total


def l1_factor(before: Tensor, after: Tensor) -> float:
    a, b = before.double().abs().sum().item(), after.double().abs().sum().item()
    return a / b if a and b else 1.0


def of(*task_vectors: list[float], base: float = 0.0) -> Models:
    """A base of one value and the experts that have these task vectors."""
    vectors = [torch.tensor(vector) for vector in task_vectors]
    return Models({"w": torch.full_like(vectors[0], base)}, [{"w": vector + base} for vector in vectors], {})


def ones(rows: int, columns: int, experts: int = 1) -> Models:
    """A zero base and task vectors of ones: what is merged shows what was dropped."""
    shape = (rows, columns)
    return Models({"w": torch.zeros(shape)}, [{"w": torch.ones(shape)} for _ in range(experts)], {})
