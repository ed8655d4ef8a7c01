"""Weighted averaging of whole models ("model soups")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import Gram, GramPass, stored_models_of
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

_CANCELLED = 1e-6  # a mean this much shorter than its terms is rounding


class LinearParameters(Strict):
    base_coefficient: float = Field(1.0, description="merge coefficient of the base model; 0 leaves it out")
    normalize: bool = Field(True, description="divide by the sum of the coefficients")
    norm_rescale: bool = Field(False, description="give each tensor the mean of the models' norms")


class Linear(Method):
    """The average of all models named, the base included:

        theta = sum_i a_i theta_i,   a_i = c_i / sum_i c_i        (a_i = c_i where normalize is off)
        times sum_i a_i |theta_i| / |theta| where norm_rescale is on

    Convention: the base model takes part with `base_coefficient` (1), so that `--base A --ft B` is the mean of
    A and B. mergekit's `linear` has no base: the same result with `base_coefficient` 0. `norm_rescale` is ours: the
    norms of `karcher` (Frobenius, per tensor, in float64) without its directions, the baseline to compare it with. A
    tensor is left as averaged where the factor would not be positive and finite, or |theta| is below a millionth of
    sum_i |a_i| |theta_i|, when it is what rounding left of models that cancel.
    Reference: Wortsman et al., Model soups, arXiv 2203.05482.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    Parameters = LinearParameters
    summary = "weighted average of all models"
    reference = "arXiv 2203.05482"

    parameters: LinearParameters

    def __init__(self, parameters: LinearParameters, experts: Any, model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        coefficients = [parameters.base_coefficient, *(expert.coefficient for expert in self.experts)]
        total = sum(coefficients) if parameters.normalize else 1.0
        if total == 0:
            raise RecipeError("method linear: the coefficients sum to 0; change them or set normalize to false")
        self._base: float = coefficients[0] / total
        self._experts: list[float] = [coefficient / total for coefficient in coefficients[1:]]

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [_Rescale([self._base, *self._experts])] if self.parameters.norm_rescale else []

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        merged = block.base * self._base
        for expert, coefficient in zip(block.experts, self._experts, strict=True):
            merged.add_(expert * coefficient)
        factor = results.get("rescale", 1.0)
        return merged if factor == 1 else merged * factor

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        entry: dict[str, Any] = {"coefficient": self._experts}
        return entry | {"rescale": results["rescale"]} if "rescale" in results else entry


class _Rescale(GramPass):
    """The weighted mean of the models' norms over the norm of their weighted mean; 1 where it says nothing."""

    name = "rescale"

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(stored_models_of, self._factor)
        self.weights = weights

    def finish(self, state: Any) -> float:
        gram = self.gram(state)
        factor = self._factor(gram, state["unit"]) if gram.is_finite else 1.0
        return factor if 0 < factor < math.inf else 1.0

    def _factor(self, gram: Gram, unit: Unit) -> float:
        if not any(map(any, gram.distances)):
            return 1.0  # equal models, to the bit
        a, n = self.weights, range(len(gram))
        squares = [weight * square for weight, square in zip(a, gram.squares, strict=True)]
        products = [a[i] * a[j] * gram.distances[i][j] for i in n for j in n if i < j]
        norm = math.sqrt(max(math.fsum(a) * math.fsum(squares) - math.fsum(products), 0.0))
        lengths = [weight * length for weight, length in zip(a, gram.norms, strict=True)]
        return math.fsum(lengths) / norm if norm > _CANCELLED * math.fsum(map(abs, lengths)) else 1.0
