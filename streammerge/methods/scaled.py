"""What methods share that add whole vectors, scaled; by coefficients of their own, one per tensor and expert."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Results, RowBlock, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


class ScaledTaskVectors(Method):
    """theta = theta_0 + sum_k alpha_k d_k; alpha is derived from what was measured, or recalled from a manifest."""

    def __init__(self, parameters: Any, experts: Sequence[ExpertParameters], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        self._recalled: Mapping[str, Sequence[float]] | None = None

    @abstractmethod
    def derived(self, tensor: TensorContext) -> list[float]:
        """alpha of every expert, from what was measured."""

    def recalled(self, coefficients: Mapping[str, Sequence[float]], tensors: Sequence[TensorContext]) -> Self | None:
        known = copy.copy(self)
        known._recalled = coefficients
        return known

    def coefficients(self, tensor: TensorContext) -> list[float]:
        """alpha of every expert."""
        return self.derived(tensor) if self._recalled is None else [*self._recalled[tensor.name]]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        return add_scaled(block.base, block.task_vectors, self.coefficients(block.tensor))

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": self.coefficients(tensor)}


def add_scaled(start: Tensor, vectors: Iterable[Tensor], coefficients: Iterable[float | Tensor]) -> Tensor:
    """v + sum_i c_i v_i.

    Args:
        start: v, [r, c].
        vectors: n times [r, c].
        coefficients: n numbers, or tensors [r, 1] or [1, c].
    """
    merged = start
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        factor = coefficient if isinstance(coefficient, (int, float)) else coefficient.to(start.dtype)
        merged = (vector * factor).add_(merged)
    return merged
