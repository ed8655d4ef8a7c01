"""The Gram matrix of a unit's inputs, measured in one pass, and linear combinations made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streammerge.errors import CheckpointError
from streammerge.methods.api import Pass, Results, RowBlock, Unit
from streammerge.methods.scaled import add_scaled

if TYPE_CHECKING:
    from torch import Tensor

ANTIPODAL = 1e-3  # rad; directions closer than this to opposite ones have no mean worth the name


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of n vectors, held as squared lengths and mutual squared distances.

    With u = v / |v|:

        <v_i, v_j> = (|v_i|^2 + |v_j|^2 - |v_i - v_j|^2) / 2
        |u_i - u_j|^2 = (|v_i - v_j|^2 - (|v_i| - |v_j|)^2) / (|v_i| |v_j|)

    Inner products alone would round the angle between close vectors away: cos 1e-8 is 1. The distance does not.

    Attributes:
        squares: |v_i|^2.
        distances: |v_i - v_j|^2, row by row.
    """

    squares: tuple[float, ...]
    distances: tuple[tuple[float, ...], ...]

    def __len__(self) -> int:
        return len(self.squares)

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(value) for row in (self.squares, *self.distances) for value in row)

    @cached_property
    def norms(self) -> list[float]:
        return [math.sqrt(square) for square in self.squares]

    def chord2(self, i: int, j: int) -> float:
        """|u_i - u_j|^2, 0 to 4; 2, a right angle, where a vector is zero."""
        a, b = self.norms[i], self.norms[j]
        if a == 0 or b == 0:
            return 2.0
        difference = (self.squares[i] - self.squares[j]) / (a + b)
        return min(max((self.distances[i][j] - difference * difference) / a / b, 0.0), 4.0)

    def cosine(self, i: int, j: int) -> float:
        return 1 - self.chord2(i, j) / 2

    @property
    def widest_angle(self) -> float | None:
        """The largest angle between two of the vectors, in rad; None where fewer than two are not zero."""
        present = [i for i, norm in enumerate(self.norms) if norm]
        chords = [self.chord2(i, j) for i in present for j in present if i < j]
        return 2 * math.asin(math.sqrt(max(chords)) / 2) if chords else None


@dataclass(frozen=True)
class Combination:
    """Coefficients of the vectors that were measured, and what else a report says of them."""

    coefficients: tuple[float, ...]
    facts: dict[str, Any]


Vectors = Callable[[RowBlock], Sequence["Tensor"]]
Solve = Callable[[Gram, Unit], Any]


class GramPass(Pass):
    """Measures the Gram matrix of a unit's inputs and solves for the coefficients of their combination.

    Products are summed in float64 along each row, and the rows' sums exactly (to twice float64's precision), so that
    the result does not depend on how the rows are cut.

    Args:
        vectors: row block -> n times [r, c].
        solve: Gram matrix and unit -> the pass's result.
        metric: row block -> [r, c], the F of <x, y> = sum F x y; None: all ones.
    """

    name = "combination"

    def __init__(self, vectors: Vectors, solve: Solve, metric: Callable[[RowBlock], Tensor] | None = None) -> None:
        self.vectors, self.solve, self.metric = vectors, solve, metric

    def start(self, unit: Unit, done: Results) -> Any:
        return {"unit": unit, "sums": {}, "scratch": []}

    def update(self, state: Any, block: RowBlock) -> None:
        import torch

        vectors = self.vectors(block)
        squares, *wide = _scratch(state, len(vectors) + 1 + (self.metric is not None), block.stored[0])
        metric = wide.pop().copy_(self.metric(block)) if self.metric is not None else None

        def add(i: int, j: int, squares: Tensor) -> None:
            weighted = squares if metric is None else squares.mul_(metric)
            state["sums"].setdefault((i, j), []).extend(exact_sum(weighted))

        for memory, vector in zip(wide, vectors, strict=True):
            memory.copy_(vector)
        for i, vector in enumerate(wide):
            for j in range(i + 1, len(wide)):
                add(i, j, torch.sub(vector, wide[j], out=squares).square_())
            add(i, i, vector.square_())  # in its own place, where it is needed no more

    def gram(self, state: Any) -> Gram:
        sums = {pair: math.fsum(parts) for pair, parts in state["sums"].items()}
        n = max((i for i, _ in sums), default=-1) + 1
        squares = tuple(sums[i, i] for i in range(n))
        distances = tuple(tuple(0.0 if i == j else sums[min(i, j), max(i, j)] for j in range(n)) for i in range(n))
        return Gram(squares, distances)

    def finish(self, state: Any) -> Any:
        gram = self.gram(state)
        if not gram.is_finite:
            raise CheckpointError(
                f"{place_of(state['unit'])}: a value is not finite (NaN or Inf), or their squares overflow, so the "
                "inputs have no angles; repair the model, or choose a method that needs none"
            )
        return self.solve(gram, state["unit"])


def place_of(unit: Unit) -> str:
    """What to call a unit in a message."""
    first = unit.tensors[0].name
    if len(unit.tensors) == 1:
        return f"tensor {first!r}"
    return f"block {unit.tensors[0].block} (tensor {first!r} and others)"


def models_of(block: RowBlock) -> list[Tensor]:
    """The base's and the experts' values."""
    return [block.base, *block.experts]


def stored_models_of(block: RowBlock) -> Sequence[Tensor]:
    """The same in their own dtypes: to be measured in float64 they need not become float32 first."""
    return block.stored


def combine(vectors: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """sum_i c_i v_i, around the first vector: v_0 + (sum c - 1) v_0 + sum_i c_i (v_i - v_0).

    So equal vectors with coefficients summing to 1 give themselves, to the bit.

    Args:
        vectors: n times [r, c].
        coefficients: n numbers, or float64 tensors [r, 1] or [1, c].
    """
    first = vectors[0]
    excess = math.fsum([*coefficients, -1.0]) if isinstance(coefficients[0], float) else sum(coefficients) - 1.0
    return add_scaled(first, [first, *(v - first for v in vectors[1:])], [excess, *coefficients[1:]])


def exact_sum(values: Tensor) -> tuple[float, float]:
    """The sum of a row block [r, c], float64: the exact sum of the rows' sums as two floats, high and low."""
    rows = values.sum(1).tolist()
    high = math.fsum(rows)
    return high, math.fsum([*rows, -high]) if math.isfinite(high) else 0.0


def _scratch(state: dict[str, Any], count: int, like: Tensor) -> list[Tensor]:
    """Float64 tensors of a row block's shape, their memory kept from block to block: new pages cost more than sums."""
    import torch

    kept = state["scratch"]
    if not kept or kept[0].numel() < like.numel() or kept[0].device != like.device:
        kept = state["scratch"] = [like.new_empty(like.numel(), dtype=torch.float64) for _ in range(count)]
    return [memory[: like.numel()].view(like.shape) for memory in kept]
