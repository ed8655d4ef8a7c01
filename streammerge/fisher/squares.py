"""From what a backward pass leaves behind to the Fisher of every tensor, handed on piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from streammerge.errors import CheckpointError
from streammerge.fisher.linear import Factors
from streammerge.fisher.names import Part

_PIECE = 1 << 20  # elements squared at a time, so that float32 copies stay small


class Sink(Protocol):
    """Where the Fisher goes, tensor by tensor, under the checkpoint's names."""

    def has(self, name: str) -> bool:
        """Whether an earlier run has finished the tensor."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Final values of the tensor's elements from the flat index `start` on, in float32 or wider."""

    def done(self, name: str, reached: bool = True) -> None:
        """All of the tensor's elements are written; whether all of them got a gradient from some token."""

    def sync(self) -> None:
        """What is done must survive an interruption from here on."""


class GradientSquares:
    """Gradient hooks that square each gradient into an accumulator and free it at once.

    For parameters that are no matrix of a linear function: norms, biases, anything else. They need one backward pass
    per sequence.

    Args:
        parameters: those to hook, by name.
        sequences: sequences per backward pass; more than one where only linear functions are expected.
        id: the model, for messages.

    Attributes:
        sums: parameter name -> sum of squared gradients, of those that got one.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sequences: int, id: str) -> None:
        self.sums: dict[str, Tensor] = {}
        self._sequences, self._id = sequences, id
        for name, parameter in parameters.items():
            parameter.requires_grad_()
            parameter.register_post_accumulate_grad_hook(partial(self._add, name))

    def _add(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # the hook runs after it is there
        if self._sequences > 1:
            raise CheckpointError(
                f"model {self._id}: the weight {name!r} of a linear layer is also used in another way, so its Fisher "
                "cannot be measured"
            )
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        total = self.sums[name]
        for sums, piece in zip(total.view(-1).split(_PIECE), gradient.reshape(-1).split(_PIECE), strict=True):
            piece = piece.to(total.dtype)
            sums.addcmul_(piece, piece)


def emit(
    parts: Mapping[str, tuple[Part, ...]],
    factors: Mapping[str, list[Factors]],
    sums: Mapping[str, Tensor],
    samples: int,
    sink: Sink,
    id: str,
) -> None:
    """Hand the Fisher of every tensor among the parts to the sink.

    What no token reached (experts the router did not choose) gets the mean Fisher of the same projection over what was
    reached, in the same block; zero where nothing was.

    Args:
        parts: parameter name -> the wanted tensors it is made of.
        factors: of the parameters used in linear functions.
        sums: squared gradients of the others.
        samples: how many sequences the sums are over.
    """
    if twice := sorted(factors.keys() & sums.keys()):
        raise CheckpointError(
            f"model {id}: parameter {twice[0]!r} is used in a linear function and in another way, so its Fisher cannot "
            "be measured"
        )
    means = _Means()
    missing: list[tuple[str, list[tuple[int, int]]]] = []
    for parameter, pieces in parts.items():
        for part in pieces:
            name, stop = part.tensor.name, part.start + part.tensor.numel
            if parameter in sums:
                values = sums[parameter].view(-1)[part.start : stop] / samples
                sink.write(name, 0, values)
                means.add(name, values)
                sink.done(name)
                continue
            reached = part.start
            gaps: list[tuple[int, int]] = []
            for factor in sorted(factors.get(parameter, ()), key=lambda factor: factor.start):
                low, high = max(part.start, factor.start), min(stop, factor.start + factor.rows * factor.columns)
                if low >= high:
                    continue
                gaps += [(reached - part.start, low - part.start)] if low > reached else []
                rows = range((low - factor.start) // factor.columns, (high - factor.start) // factor.columns)
                for row, values in factor.mean_squares(samples, rows):
                    sink.write(name, factor.start + row * factor.columns - part.start, values)
                    means.add(name, values)
                reached = high
            gaps += [(reached - part.start, stop - part.start)] if stop > reached else []
            if gaps:
                missing.append((name, gaps))
            else:
                sink.done(name)
    for name, gaps in missing:
        for start, stop in gaps:
            for position in range(start, stop, _PIECE):
                sink.write(name, position, torch.full((min(_PIECE, stop - position),), means.of(name)))
        sink.done(name, reached=False)


def wanted_parts(
    parts: Mapping[str, tuple[Part, ...]], parameters: Iterable[str], wanted: Set[str], sink: Sink
) -> dict[str, tuple[Part, ...]]:
    """Of some parameters, the parts whose tensors are wanted and not finished yet."""
    found = {
        name: tuple(p for p in parts[name] if p.tensor.name in wanted and not sink.has(p.tensor.name))
        for name in parameters
    }
    return {name: left for name, left in found.items() if left}


class _Means:
    """Mean over what was reached, per projection: tensors whose names differ in numbers alone."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self._totals.get(_kind(name), (0.0, 0))
        self._totals[_kind(name)] = (total + values.sum(dtype=torch.float64).item(), count + values.numel())

    def of(self, name: str) -> float:
        total, count = self._totals.get(_kind(name), (0.0, 0))
        return total / count if count else 0.0


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
