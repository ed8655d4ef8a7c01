"""Linear functions on weights as they are stored, and sums over gradients that never need a whole gradient.

For y = x W^T the gradient of W in sequence i is G_i^T X_i, the product of two thin matrices: gradients at the
output and inputs, one row per token. So the backward pass keeps those two, and the mean of squares

    F = (1/N) sum_i (G_i^T X_i)^2

or another sum over sequences, is formed block by block in cache. No gradient of a weight ever exists as a whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from streammerge.fisher.recall import Recall
from streammerge.workers import Workers

_SQUARES = {"cpu": (256, 1536)}  # rows and columns of a gradient formed at a time; these stay in cache
_SQUARES_ON_GPU = (4096, 8192)
_TILE = 3 << 19  # weight elements converted at a time: a few MiB in float32, which stay in the last-level cache


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)


class MixedSequencesError(Exception):
    """A linear function saw its inputs in a form in which the sequences cannot be told apart."""


@dataclass
class Factors:
    """The thin factors of one weight's gradients.

    Attributes:
        start: index of the weight's first element in the flattened parameter it is (a part of).
        rows, columns: the weight's shape.
        groups: (output gradients [sequences, tokens, rows], inputs [sequences, tokens, columns]) per group.
    """

    start: int
    rows: int
    columns: int
    groups: list[tuple[Tensor, Tensor]]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the gradient that are formed at a time."""
        return _SQUARES.get(self.groups[0][0].device.type, _SQUARES_ON_GPU)

    def widened(self) -> Factors:
        """The same in float32 or wider."""
        wide = torch.promote_types(self.groups[0][0].dtype, torch.float32)
        groups = [(gradient.to(wide), inputs.to(wide)) for gradient, inputs in self.groups]
        return Factors(self.start, self.rows, self.columns, groups)

    def mean_squares(self, rows: range, samples: int, workers: Workers) -> Tensor:
        """Mean of squared gradients of some rows, [rows, columns], of widened factors; in scratch memory."""
        return self._sum(rows, workers, lambda total, piece: total.addcmul_(piece, piece)).div_(samples)

    def magnitude(self, rows: range, weight: Tensor, workers: Workers) -> float:
        """Sum of |weight * gradient| over some rows and all sequences, of widened factors; `weight`: those rows."""
        total = self._sum(rows, workers, lambda total, piece: total.add_(piece.abs_()))
        total.mul_(workers.scratch("weight", total, *weight.shape).copy_(weight)).abs_()
        return total.sum(dtype=torch.float64).item()

    def _sum(self, rows: range, workers: Workers, add: Callable[[Tensor, Tensor], object]) -> Tensor:
        """What every sequence's gradient of some rows adds to a total, [rows, columns], that begins with 0."""
        like, step = self.groups[0][1], self.tile[1]
        total = workers.scratch("total", like, len(rows), self.columns).zero_()
        for gradients, inputs in self.groups:
            for left, right in zip(gradients[:, :, rows.start : rows.stop].mT, inputs, strict=True):
                for some in range(0, self.columns, step):
                    columns = slice(some, min(some + step, self.columns))
                    piece = workers.scratch("piece", like, len(rows), columns.stop - columns.start)
                    torch.mm(left, right[:, columns], out=piece)
                    add(total[:, columns], piece)
        return total


class LinearFunctions(TorchFunctionMode):
    """Runs `linear` of known weights from the dtype they are stored in, and records the factors of their gradients.

    Active around a module's forward, it sees every linear function, whether of an `nn.Linear`, a router or an
    expert's slice of a stacked parameter; the weight is told by its address. No weight gets a gradient.

    Args:
        weights: parameter name -> parameter, in memory.
        workers: share the products on the CPU.
        recall: remembers results from the forward pass for the backward one; None: they are computed again.
        observe: shown every linear function: the parameter, the index of the weight's first element in it, flattened,
            the weight and the inputs.

    Attributes:
        factors: parameter name -> what its linear functions left in the backward passes of all groups.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        workers: Workers,
        recall: Recall | None = None,
        observe: Callable[[str, int, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._observe = observe
        spans = sorted(
            (weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size(), name)
            for name, weight in weights.items()
            if weight.dim() > 1 and weight.numel()
        )
        self._starts = [start for start, _, _ in spans]
        self._spans, self._workers, self._recall = spans, workers, recall
        self._sequences, self._tokens = 1, 0
        self._calls: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        self.factors: dict[str, list[Factors]] = {}

    @contextmanager
    def group(self, sequences: int, tokens: int) -> Iterator[None]:
        """Around forward and backward of a group of sequences; with several, the inputs must keep them apart."""
        self._sequences, self._tokens, self._calls = sequences, tokens, {}
        with self:
            yield
        for (name, start), calls in self._calls.items():
            gradient, inputs = (torch.cat(side, 1) if len(side) > 1 else side[0] for side in zip(*calls, strict=True))
            known = self.factors.setdefault(name, [])
            factors = next((factors for factors in known if factors.start == start), None)
            if factors is None:
                factors = Factors(start, gradient.shape[2], inputs.shape[2], [])
                known.append(factors)
            factors.groups.append((gradient, inputs))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            inputs, weight, bias = _arguments(*args, **(kwargs or {}))
            key = self._find(weight)
            if key is not None:
                self._require_apart(inputs)
                if self._observe is not None:
                    self._observe(*key, weight, inputs)
                known = self._recall.get() if self._recall and torch.is_grad_enabled() else None
                keep = partial(self._keep, key)
                out = _linear(inputs, weight.detach(), bias, known, keep, self._workers)
                if self._recall and not torch.is_grad_enabled():
                    self._recall.put(out)
                return out
        if func in _PRODUCTS and not kwargs and _is_slow(args[0]):
            return func(*(_wide(side) for side in args)).to(args[0].dtype)
        return func(*args, **(kwargs or {}))

    def _find(self, weight: Tensor) -> tuple[str, int] | None:
        address = weight.data_ptr()
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._spans[index][1] or not weight.is_contiguous():
            return None
        return self._spans[index][2], (address - self._spans[index][0]) // weight.element_size()

    def _require_apart(self, inputs: Tensor) -> None:
        rows = inputs.numel() // max(inputs.shape[-1], 1)
        if self._sequences > 1 and rows != self._sequences * self._tokens:
            raise MixedSequencesError

    def _keep(self, key: tuple[str, int], gradient: Tensor, inputs: Tensor) -> None:
        def by_sequence(side: Tensor) -> Tensor:
            return side.detach().reshape(self._sequences, -1, side.shape[-1])

        self._calls.setdefault(key, []).append((by_sequence(gradient), by_sequence(inputs)))


class _Linear(torch.autograd.Function):
    """x W^T + b with W in any floating dtype; W gets no gradient, its factors go to `keep`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        known: Tensor | None,
        keep: Callable[..., None],
        workers: Workers,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.keep, ctx.workers = weight, keep, workers
        ctx.bias = bias is not None and bias.requires_grad
        return product(inputs, weight, bias, workers) if known is None else known

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (inputs,) = gradients, ctx.saved_tensors
        ctx.keep(gradient, inputs)
        bias = gradient.flatten(0, -2).sum(0) if ctx.bias else None
        return product_back(gradient, ctx.weight, ctx.workers), None, bias, None, None, None


_linear: Callable[..., Tensor] = _Linear.apply  # torch does not say its type


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None, workers: Workers) -> Tensor:
    """inputs [..., columns] times weight [rows, columns] transposed, in the dtype of the inputs.

    A weight in another dtype, or a half-precision one on a processor without matrix units for it, is converted to
    the accumulator's dtype a few rows at a time: the same numbers, rounded once at the end.
    """
    if inputs.device.type != "cpu":
        return functional.linear(inputs, weight.to(inputs.dtype), bias)
    flat = inputs.reshape(-1, inputs.shape[-1])
    direct = _direct(inputs, weight)
    x = flat if direct else _wide(flat)
    out = inputs.new_empty(len(x), len(weight))

    def some_rows(rows: slice) -> None:
        part = weight[rows]
        if direct:
            out[:, rows] = functional.linear(x, part, None if bias is None else bias[rows])
            return
        converted = workers.scratch("weight", x, *part.shape).copy_(part)
        found = torch.mm(x, converted.T, out=workers.scratch("product", x, len(x), len(part)))
        out[:, rows] = found if bias is None else found.add_(bias[rows])

    workers.run(some_rows, _tiles(len(weight), weight.shape[1]))
    return out.view(*inputs.shape[:-1], len(weight))


def product_back(gradient: Tensor, weight: Tensor, workers: Workers) -> Tensor:
    """gradient [..., rows] times weight [rows, columns], in the dtype of the gradient."""
    if gradient.device.type != "cpu":
        return gradient @ weight.to(gradient.dtype)
    flat = gradient.reshape(-1, gradient.shape[-1])
    direct = _direct(gradient, weight)
    g = flat if direct else _wide(flat)
    out = gradient.new_empty(len(g), weight.shape[1])

    def some_columns(columns: slice) -> None:
        part = weight[:, columns]
        if direct:
            out[:, columns] = g @ part
            return
        converted = workers.scratch("weight", g, *part.shape).copy_(part)
        out[:, columns] = torch.mm(g, converted, out=workers.scratch("product", g, len(g), part.shape[1]))

    workers.run(some_columns, _tiles(weight.shape[1], len(weight)))
    return out.view(*gradient.shape[:-1], weight.shape[1])


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _direct(values: Tensor, weight: Tensor) -> bool:
    """Whether the processor multiplies these as they are, faster than after a conversion."""
    return values.dtype == weight.dtype and not _is_slow(values)


def _is_slow(values: Tensor) -> bool:
    """Whether the device has no fast products in the dtype of the values, so that they are made in float32."""
    if values.device.type != "cpu" or values.dtype not in (torch.bfloat16, torch.float16):
        return False
    return values.dtype == torch.float16 or not _has_bfloat16_units()


@cache
def _has_bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16 (AVX-512 BF16, AMX); others are faster in float32."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def _tiles(count: int, length: int) -> list[slice]:
    """`count` rows (or columns) of that length, cut into pieces of a size that stays in cache when converted."""
    step = max(1, _TILE // max(length, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of `torch.nn.functional.linear`, however they are given."""
    return input, weight, bias
