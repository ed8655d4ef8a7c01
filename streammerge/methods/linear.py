"""Weighted averaging of whole models ("model soups")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import Method, ModelFacts, Results, RowBlock, TensorContext
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class LinearParameters(Strict):
    base_coefficient: float = Field(1.0, description="merge coefficient of the base model; 0 leaves it out")
    normalize: bool = Field(True, description="divide by the sum of the coefficients")


class Linear(Method):
    """The average of all models named, the base included:

        theta = sum_i c_i theta_i / sum_i c_i        (without the division where normalize is off)

    Convention: the base model takes part with `base_coefficient` (1), so that `--base A --ft B` is the mean of
    A and B. mergekit's `linear` has no base: the same result with `base_coefficient` 0.
    Reference: Wortsman et al., Model soups, arXiv 2203.05482.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    Parameters = LinearParameters
    summary = "weighted average of all models"
    reference = "arXiv 2203.05482"

    def __init__(self, parameters: LinearParameters, experts: Any, model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        coefficients = [parameters.base_coefficient, *(expert.coefficient for expert in self.experts)]
        total = sum(coefficients) if parameters.normalize else 1.0
        if total == 0:
            raise RecipeError("method linear: the coefficients sum to 0; change them or set normalize to false")
        self._base: float = coefficients[0] / total
        self._experts: list[float] = [coefficient / total for coefficient in coefficients[1:]]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        merged = block.base * self._base
        for expert, coefficient in zip(block.experts, self._experts, strict=True):
            merged += expert * coefficient
        return merged

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": self._experts}
