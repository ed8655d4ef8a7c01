"""Linear functions on weights as they are stored, and squared gradients that never need the gradient.

For y = x W^T the gradient of W in sequence i is G_i^T X_i, the product of two thin matrices: gradients at the
output and inputs, one row per token. So the backward pass keeps those two, and the mean of squares

    F = (1/N) sum_i (G_i^T X_i)^2

is formed row block by row block in cache. No gradient of a weight ever exists as a whole.
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

from streammerge.fisher.placement import SQUARES

_TILE = 3 << 19  # weight elements converted at a time: a few MiB in float32, which stay in the last-level cache


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

    def mean_squares(self, samples: int, rows: range) -> Iterator[tuple[int, Tensor]]:
        """(first row, mean of squared gradients [some rows, columns]) down the rows, in float32 or wider."""
        wide = torch.promote_types(self.groups[0][0].dtype, torch.float32)
        groups = [(gradient.to(wide).transpose(1, 2).contiguous(), inputs.to(wide)) for gradient, inputs in self.groups]
        most = max(len(inputs) for _, inputs in groups)
        step = min(len(rows), max(1, SQUARES // (most * self.columns)))
        buffer = torch.empty(most * step * self.columns, dtype=wide, device=groups[0][0].device)
        total = torch.empty(step, self.columns, dtype=wide, device=buffer.device)
        for row in rows[::step]:
            stop = min(row + step, rows.stop)
            sums = total[: stop - row].zero_()
            for gradient, inputs in groups:
                count = len(inputs) * (stop - row) * self.columns
                squares = buffer[:count].view(len(inputs), stop - row, self.columns)
                torch.bmm(gradient[:, row:stop], inputs, out=squares)
                for of_sequence in squares:
                    sums.addcmul_(of_sequence, of_sequence)
            yield row, sums.div_(samples)


class LinearFunctions(TorchFunctionMode):
    """Runs `linear` of known weights from the dtype they are stored in, and records the factors of their gradients.

    Active around a module's forward, it sees every linear function, whether of an `nn.Linear`, a router or an
    expert's slice of a stacked parameter; the weight is told by its address. No weight gets a gradient.

    Args:
        weights: parameter name -> parameter, in memory.

    Attributes:
        factors: parameter name -> what its linear functions left in the backward passes of all groups.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        spans = sorted(
            (weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size(), name)
            for name, weight in weights.items()
            if weight.dim() > 1 and weight.numel()
        )
        self._starts = [start for start, _, _ in spans]
        self._spans = spans
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
                keep = partial(self._keep, key)
                return _Linear.apply(inputs, weight.detach(), bias, keep)  # type: ignore[no-untyped-call]
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
        sides = (side.detach().reshape(self._sequences, -1, side.shape[-1]) for side in (gradient, inputs))
        self._calls.setdefault(key, []).append(tuple(sides))  # type: ignore[arg-type]


class _Linear(torch.autograd.Function):
    """x W^T + b with W in any floating dtype; W gets no gradient, its factors go to `keep`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, keep: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.keep, ctx.bias = weight, keep, bias is not None and bias.requires_grad
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (inputs,) = gradients, ctx.saved_tensors
        ctx.keep(gradient, inputs)
        bias = gradient.flatten(0, -2).sum(0) if ctx.bias else None
        return product_back(gradient, ctx.weight), None, bias, None


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs [..., columns] times weight [rows, columns] transposed, in the dtype of the inputs.

    A weight in another dtype, or a half-precision one on a processor without matrix units for it, is converted to
    the accumulator's dtype a few rows at a time: the same numbers, rounded once at the end.
    """
    if _direct(inputs, weight):
        return functional.linear(inputs, weight.to(inputs.dtype), bias)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    x = inputs.reshape(-1, inputs.shape[-1]).to(wide)
    out = inputs.new_empty(len(x), len(weight))
    for rows in _tiles(weight):
        part = x @ weight[rows].to(wide).T
        out[:, rows] = part if bias is None else part.add_(bias[rows])
    return out.view(*inputs.shape[:-1], len(weight))


def product_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [..., rows] times weight [rows, columns], in the dtype of the gradient."""
    if _direct(gradient, weight):
        return gradient @ weight.to(gradient.dtype)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g = gradient.reshape(-1, gradient.shape[-1])
    out = torch.zeros(len(g), weight.shape[1], dtype=wide, device=g.device)
    for rows in _tiles(weight):
        out.addmm_(g[:, rows].to(wide), weight[rows].to(wide))
    return out.to(gradient.dtype).view(*gradient.shape[:-1], weight.shape[1])


def _direct(values: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies in this dtype faster than after a conversion."""
    if values.device.type != "cpu":
        return True
    if values.dtype in (torch.float32, torch.float64):
        return weight.dtype == values.dtype
    return weight.dtype == values.dtype and values.dtype == torch.bfloat16 and _has_bfloat16_units()


@cache
def _has_bfloat16_units() -> bool:
    """Whether the processor has matrix units for bfloat16 (Intel AMX); others are faster in float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _tiles(weight: Tensor) -> Iterator[slice]:
    rows, columns = weight.shape
    step = max(1, _TILE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of `torch.nn.functional.linear`, however they are given."""
    return input, weight, bias
