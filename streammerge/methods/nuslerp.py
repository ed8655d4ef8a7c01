"""Spherical interpolation by weights: of whole tensors, rows or columns; of two models or of their task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import Combination, GramPass, combine, models_of
from streammerge.methods.scaled import add_scaled
from streammerge.methods.slerp import interpolate, slerp_coefficients
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class NuslerpParameters(Strict):
    base_coefficient: float = Field(1.0, description="weight of the base model, with one fine-tuned model")
    task_vectors: bool = Field(
        True,
        description="with two fine-tuned models: interpolate their task vectors; off: the models, without the base",
    )
    nuslerp_flatten: bool = Field(True, description="a tensor is one vector; off: each row of a matrix is one")
    nuslerp_row_wise: bool = Field(False, description="with nuslerp_flatten off: each column of a matrix is a vector")


class Nuslerp(Method):
    """Spherical interpolation of v_0 and v_1, w the angle between them, t = c_1 / (c_0 + c_1):

        theta = sin((1 - t) w) / sin w * v_0 + sin(t w) / sin w * v_1              one fine-tuned model: v_0 the base
        theta = theta_0 + the same of the task vectors v_i = theta_i - theta_0     two fine-tuned models

    Convention: with one fine-tuned model it is mergekit's nuslerp of two models without a base model; with two, that
    with a base model, or without one where `task_vectors` is off. Options as there: with `nuslerp_flatten` off every
    row of a matrix is a vector of its own, with `nuslerp_row_wise` too every column (a stack of matrices counts as one
    matrix [.., c]). Anything but a matrix is one vector. Angles come from distances in float64, so that small ones are
    not rounded to 0 (mergekit: linear there). Linear, (1 - t) v_0 + t v_1, only for zero vectors, vectors of one
    element and within 0.001 rad of opposite ones. Weights that sum to 0 are an error (mergekit: t = 0.5). The report
    has coefficients and `angle` of whole tensors only.
    Reference: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, doi 10.1145/325165.325242

    Raises:
        RecipeError: more than two fine-tuned models, or weights that sum to zero.
    """

    Parameters = NuslerpParameters
    Expert = ExpertParameters
    most_experts = 2
    summary = "spherical interpolation by weights, of models or task vectors, whole or by rows"
    reference = "doi 10.1145/325165.325242"

    parameters: NuslerpParameters

    def __init__(self, parameters: NuslerpParameters, experts: Sequence[ExpertParameters], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        if len(experts) > 2:
            raise RecipeError(
                f"method nuslerp merges one or two fine-tuned models, not {len(experts)}: choose multislerp or karcher"
            )
        weights = [expert.coefficient for expert in experts]
        if len(weights) == 1:
            weights.insert(0, parameters.base_coefficient)
        if sum(weights) == 0:
            raise RecipeError("method nuslerp: the coefficients sum to 0; change them")
        self._t = weights[1] / sum(weights)
        self._around_base = len(experts) == 2 and parameters.task_vectors

    def passes(self, unit: Unit) -> Sequence[Pass]:
        if self._by_rows(unit.tensors[0]):
            return []
        if self._by_columns(unit.tensors[0]):
            return [_Columns(self._vectors, self._t)]
        return [GramPass(self._vectors, lambda gram, unit: interpolate(gram, unit, self._t))]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        vectors = self._vectors(block)
        coefficients: Sequence[float | Tensor]
        if self._by_rows(block.tensor):
            sums = [square.sum(1, keepdim=True) for square in _squares(vectors)]
            coefficients = slerp_coefficients(sums, block.tensor.columns, self._t)[:2]
        elif self._by_columns(block.tensor):
            coefficients = results["columns"]
        else:
            coefficients = results["combination"].coefficients
        return add_scaled(block.base, vectors, coefficients) if self._around_base else combine(vectors, coefficients)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        if "combination" not in results:
            return {"coefficient": [None] * len(self.experts)}
        combination: Combination = results["combination"]
        entry: dict[str, Any] = {"coefficient": list(combination.coefficients[-len(self.experts) :])}
        if len(self.experts) == 1:
            entry["base_coefficient"] = combination.coefficients[0]
        return entry | combination.facts

    def _by_rows(self, tensor: TensorContext) -> bool:
        return tensor.is_matrix and not self.parameters.nuslerp_flatten and not self.parameters.nuslerp_row_wise

    def _by_columns(self, tensor: TensorContext) -> bool:
        return tensor.is_matrix and not self.parameters.nuslerp_flatten and self.parameters.nuslerp_row_wise

    def _vectors(self, block: RowBlock) -> Sequence[Tensor]:
        return block.task_vectors if self._around_base else models_of(block)[-2:]


class _Columns(Pass):
    """Slerp coefficients [1, c] of every column of a matrix."""

    name = "columns"

    def __init__(self, vectors: Any, t: float) -> None:
        self.vectors, self.t = vectors, t

    def start(self, unit: Unit, done: Results) -> Any:
        return {"rows": unit.tensors[0].rows, "sums": None}

    def update(self, state: Any, block: RowBlock) -> None:
        sums = [square.sum(0, keepdim=True) for square in _squares(self.vectors(block))]
        before = state["sums"]
        state["sums"] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]

    def finish(self, state: Any) -> Sequence[Tensor] | None:
        return slerp_coefficients(state["sums"], state["rows"], self.t)[:2] if state["sums"] else None


def _squares(vectors: Sequence[Tensor]) -> list[Tensor]:
    """The squares of v_0, v_1 and v_0 - v_1, in float64."""
    first, second = (vector.double() for vector in vectors)
    return [first.square(), second.square(), (first - second).square_()]
