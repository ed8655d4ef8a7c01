"""From what a backward pass leaves behind to the Fisher of every tensor, handed on piece by piece."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from functools import partial
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor, nn

from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import CheckpointError
from streammerge.fisher.linear import Factors
from streammerge.fisher.names import Part
from streammerge.workers import Workers

_PIECE = 1 << 20  # elements squared at a time, so that float32 copies stay small


class Sink(Protocol):
    """Where the Fisher goes, tensor by tensor, under the checkpoint's names."""

    def has(self, name: str) -> bool:
        """Whether an earlier run has finished the tensor."""

    def mean(self, name: str) -> float | None:
        """Mean of a finished tensor all of which was reached; None where some was not."""

    def write(self, name: str, start: int, values: Tensor) -> float:
        """Final values of the tensor's elements from the flat index `start` on; returns their sum. From any thread."""

    def done(self, name: str, reached: bool = True) -> None:
        """All of the tensor's elements are written; whether all of them got a gradient from some token."""

    def sync(self) -> None:
        """What is done must survive an interruption from here on."""


class GradientHooks(ABC):
    """Gradient hooks that reduce each gradient into an accumulator and free it at once.

    For parameters that are no matrix of a linear function: norms, biases, anything else. They need one backward pass
    per sequence.

    Args:
        parameters: those to hook, by name.
        sequences: sequences per backward pass; more than one where only linear functions are expected.
        id: the model, for messages.

    Attributes:
        sums: parameter name -> what its gradients came to, of those that got one.
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
                f"model {self._id}: the weight {name!r} of a linear layer is also used in another way, so its "
                "gradients cannot be told apart by sequence"
            )
        self.add(name, parameter, gradient)

    @abstractmethod
    def add(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Take the gradient of one sequence into the parameter's sum."""


class GradientSquares(GradientHooks):
    """Sums of squares, [as the parameter]; float32 or wider."""

    def add(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
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
    workers: Workers,
    id: str,
    finished: Iterable[TensorInfo] = (),
) -> None:
    """Hand the Fisher of every tensor among the parts to the sink.

    What no token reached (experts the router did not choose) gets the mean Fisher of the same projection over what was
    reached, in the same block; zero where nothing was.

    Args:
        parts: parameter name -> the wanted tensors it is made of.
        factors: of the parameters used in linear functions.
        sums: squared gradients of the others.
        samples: how many sequences the sums are over.
        finished: tensors of the same block that an interrupted run has finished.
    """
    if twice := sorted(factors.keys() & sums.keys()):
        raise CheckpointError(
            f"model {id}: parameter {twice[0]!r} is used in a linear function and in another way, so its Fisher cannot "
            "be measured"
        )
    reached = _Reached()
    for info in finished:
        if (mean := sink.mean(info.name)) is not None:
            reached.add(info.name, mean * info.numel, info.numel)
    missing: list[tuple[str, list[range]]] = []
    for parameter, pieces in parts.items():
        wide = [factor.widened() for factor in factors.get(parameter, ())]
        for part in pieces:
            name, count = part.tensor.name, part.tensor.numel
            if parameter in sums:
                values = sums[parameter].view(-1)[part.start : part.start + count] / samples
                reached.add(name, sink.write(name, 0, values), count)
                sink.done(name)
                continue
            gaps = [range(count)]
            for factor in wide:
                gaps = _write_rows(part, factor, gaps, samples, sink, workers, reached)
            if gaps:
                missing.append((name, gaps))
            else:
                sink.done(name)
    for name, gaps in missing:
        for gap in gaps:
            for start in gap[::_PIECE]:
                sink.write(name, start, torch.full((min(_PIECE, gap.stop - start),), reached.mean(name)))
        sink.done(name, reached=False)


def _write_rows(
    part: Part, factor: Factors, gaps: list[range], samples: int, sink: Sink, workers: Workers, reached: _Reached
) -> list[range]:
    """Write what a linear function gave for its rows of a tensor; returns what of `gaps` is left."""
    columns = factor.columns
    low = max(part.start, factor.start)
    high = min(part.start + part.tensor.numel, factor.start + factor.rows * columns)
    if low >= high:
        return gaps

    def write(first: int) -> None:
        rows = range(first, min(first + factor.tile[0], (high - factor.start) // columns))
        values = factor.mean_squares(rows, samples, workers)
        start = factor.start + first * columns - part.start
        reached.add(part.tensor.name, sink.write(part.tensor.name, start, values), values.numel())

    workers.run(write, range((low - factor.start) // columns, (high - factor.start) // columns, factor.tile[0]))
    done = range(low - part.start, high - part.start)
    left = [(range(gap.start, min(gap.stop, done.start)), range(max(gap.start, done.stop), gap.stop)) for gap in gaps]
    return [piece for pieces in left for piece in pieces if piece]


def wanted_parts(
    parts: Mapping[str, tuple[Part, ...]], parameters: Iterable[str], wanted: Set[str], sink: Sink
) -> dict[str, tuple[Part, ...]]:
    """Of some parameters, the parts whose tensors are wanted and not finished yet."""
    found = {
        name: tuple(p for p in parts[name] if p.tensor.name in wanted and not sink.has(p.tensor.name))
        for name in parameters
    }
    return {name: left for name, left in found.items() if left}


class _Reached:
    """Mean over what was reached, per projection: tensors whose names differ in numbers alone.

    It is made from the means of the tensors, as they are recorded, so that it is the same after an interruption.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        self._lock = Lock()

    def add(self, name: str, total: float, count: int) -> None:
        with self._lock:
            self._sums.setdefault(name, []).append(total)
            self._counts[name] = self._counts.get(name, 0) + count

    def mean(self, name: str) -> float:
        kin = [other for other in self._counts if _kind(other) == _kind(name)]
        total = math.fsum(math.fsum(self._sums[other]) / self._counts[other] * self._counts[other] for other in kin)
        return total / max(sum(self._counts[other] for other in kin), 1)


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)  # not the number in Mixtral's w1
