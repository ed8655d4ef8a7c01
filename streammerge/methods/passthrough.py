"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Results, RowBlock, TensorContext
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Method):
    """The values of the one fine-tuned model, times a factor:

        theta = c_1 theta_1

    Convention: mergekit's `scale` is the coefficient here. Names, shapes, dtypes and side files are the base's, as with
    every method; of the base's values nothing is left.
    Reference: mergekit, https://github.com/arcee-ai/mergekit

    Raises:
        RecipeError: more than one fine-tuned model.
    """

    summary = "one model as it is, or scaled"
    reference = "https://github.com/arcee-ai/mergekit"
    most_experts = 1

    def __init__(self, parameters: Strict, experts: Sequence[ExpertParameters], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        if len(experts) != 1:
            raise RecipeError(f"method passthrough takes one fine-tuned model, not {len(experts)}: choose linear")

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        coefficient: float = self.experts[0].coefficient
        return block.experts[0] * coefficient

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": [self.experts[0].coefficient]}
