"""Barycentre of directions, times the mean norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import ANTIPODAL, Combination, Gram, GramPass, combine
from streammerge.methods.scaled import add_scaled
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class MultislerpParameters(Strict):
    normalize_weights: bool = Field(True, description="divide the weights by their sum")
    eps: float = Field(1e-8, ge=0, description="vectors up to this long count as zero: they have no direction")
    task_vectors: bool = Field(True, description="merge the task vectors; off: the models themselves, without the base")


class Multislerp(Method):
    """One step from the normalised mean of the directions, times the mean norm; with v_i = theta_i - theta_0:

        m = sum_i a_i u_i / |sum_i a_i u_i|,  u_i = v_i / |v_i|,  a_i = c_i / sum_i c_i
        T = sum_i a_i (u_i - <u_i, m> m) = 0;   theta = theta_0 + (sum_i a_i |v_i|) m

    Convention: as mergekit's multislerp with a base model; without one (v_i = theta_i, no theta_0) where `task_vectors`
    is off. mergekit goes on from m by the tangent T, which is zero whatever the vectors, as sum_i a_i u_i is parallel
    to m: what it adds is rounding. So this is the normalised mean; `karcher` is the iteration that moves. Vectors up to
    `eps` long have no direction, but count in the mean norm (mergekit adds `eps` to every norm). The linear mean
    sum_i a_i v_i is taken for tensors of one element and where the mean direction vanishes, |sum_i a_i u_i| <=
    0.0005 sum_i |a_i| (mergekit: for two vectors, an error for more); the report then has `linear` true.
    Reference: mergekit's own; the mean it approximates: Buss, Fillmore, Spherical averages, doi 10.1145/502122.502124

    Raises:
        RecipeError: the weights sum to zero where they should be normalised.
    """

    Parameters = MultislerpParameters
    Expert = ExpertParameters
    summary = "normalised mean of the task vectors' directions, mean norm"
    reference = "doi 10.1145/502122.502124"

    parameters: MultislerpParameters

    def __init__(
        self, parameters: MultislerpParameters, experts: Sequence[ExpertParameters], model: ModelFacts
    ) -> None:
        super().__init__(parameters, experts, model)
        weights = [expert.coefficient for expert in experts]
        total = math.fsum(weights) if parameters.normalize_weights else 1.0
        if total == 0:
            raise RecipeError(
                "method multislerp: the coefficients sum to 0; change them or set normalize_weights to false"
            )
        self._weights = [weight / total for weight in weights]

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [GramPass(self._vectors, self._solve)]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        coefficients = results["combination"].coefficients
        if self.parameters.task_vectors:
            return add_scaled(block.base, block.task_vectors, coefficients)
        return combine(block.experts, coefficients)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": list(results["combination"].coefficients), **results["combination"].facts}

    def _vectors(self, block: RowBlock) -> Sequence[Tensor]:
        return block.task_vectors if self.parameters.task_vectors else block.experts

    def _solve(self, gram: Gram, unit: Unit) -> Combination:
        weights, norms = self._weights, gram.norms
        present = [i for i, norm in enumerate(norms) if norm > self.parameters.eps]
        square = math.fsum(weights[i] * weights[j] * gram.cosine(i, j) for i in present for j in present)
        length = math.sqrt(max(square, 0.0))
        linear = unit.numel <= 1 or length <= ANTIPODAL / 2 * math.fsum(abs(weights[i]) for i in present)
        coefficients = list(weights)
        if not linear:
            scale = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
            coefficients = [0.0] * len(norms)
            for i in present:
                coefficients[i] = scale * weights[i] / length / norms[i]
        return Combination(tuple(coefficients), {"angle": gram.widest_angle, "linear": linear})
