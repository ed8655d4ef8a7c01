"""Model Stock: towards the base by as much as the fine-tuned models disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import Combination, Gram, GramPass
from streammerge.methods.scaled import add_scaled
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class ModelStockParameters(Strict):
    filter_wise: bool = Field(False, description="an interpolation ratio for each row of a matrix, not for each tensor")


class ModelStockExpert(Strict):
    """A fine-tuned model has no parameters of its own here."""


class ModelStock(Method):
    """Between the base and the mean of the N fine-tuned models, by the angle between their task vectors d_i:

        c = mean over pairs i < j of <d_i, d_j> / (|d_i| |d_j|)
        t = N c / (1 + (N - 1) c), 0 where c < 0;   theta = theta_0 + t mean_i d_i

    Convention: t is clamped to [0, 1]; mergekit's is not, and goes away from the models where c < 0. A pair with a zero
    task vector counts as cosine 0. Cosines run in float64 and are exact for short task vectors (mergekit divides by at
    least 1e-6). With `filter_wise` every row of a matrix has its own t, anything else has one; the report then has no
    coefficients.
    Reference: Jang et al., Model Stock, arXiv 2403.19522.

    Raises:
        RecipeError: fewer than two fine-tuned models.
    """

    Parameters = ModelStockParameters
    Expert = ModelStockExpert
    fewest_experts = 2
    summary = "mean of the models, drawn towards the base by their angle"
    reference = "arXiv 2403.19522"

    parameters: ModelStockParameters

    def __init__(
        self, parameters: ModelStockParameters, experts: Sequence[ModelStockExpert], model: ModelFacts
    ) -> None:
        super().__init__(parameters, experts, model)
        if len(experts) < 2:
            raise RecipeError("method model_stock needs two fine-tuned models or more: add one, or choose linear")

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [] if self._by_rows(unit.tensors[0]) else [GramPass(_task_vectors, _solve)]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        vectors = block.task_vectors
        coefficients: Sequence[float | Tensor]
        if self._by_rows(block.tensor):
            coefficients = [_row_ratios(vectors) / len(vectors)] * len(vectors)
        else:
            coefficients = results["combination"].coefficients
        return add_scaled(block.base, vectors, coefficients)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        if "combination" not in results:
            return {"coefficient": [None] * len(self.experts)}
        return {"coefficient": list(results["combination"].coefficients), **results["combination"].facts}

    def _by_rows(self, tensor: TensorContext) -> bool:
        return self.parameters.filter_wise and tensor.is_matrix


def _task_vectors(block: RowBlock) -> list[Tensor]:
    return block.task_vectors


def _solve(gram: Gram, unit: Unit) -> Combination:
    n = len(gram)
    pairs = list(itertools.combinations(range(n), 2))
    cosine = math.fsum(gram.cosine(i, j) for i, j in pairs) / len(pairs)
    positive = max(cosine, 0.0)
    ratio = n * positive / (1 + (n - 1) * positive)
    return Combination((ratio / n,) * n, {"cosine": cosine, "ratio": ratio})


def _row_ratios(vectors: Sequence[Tensor]) -> Tensor:
    """t of every row: [r, 1], float64."""
    wide = [vector.double() for vector in vectors]
    norms = [vector.square().sum(1, keepdim=True).sqrt() for vector in wide]
    cosines = []
    for i, j in itertools.combinations(range(len(wide)), 2):
        product = (wide[i] * wide[j]).sum(1, keepdim=True)
        zero = (norms[i] == 0) | (norms[j] == 0)
        cosines.append((product / norms[i] / norms[j]).masked_fill(zero, 0.0).clamp(-1.0, 1.0))
    total = cosines[0]
    for cosine in cosines[1:]:
        total = total + cosine
    positive = (total / len(cosines)).clamp(min=0.0)
    n = len(wide)
    return n * positive / (1 + (n - 1) * positive)
