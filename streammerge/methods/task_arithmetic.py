"""Task arithmetic: scaled task vectors added to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.methods.api import ExpertParameters, Method, Results, RowBlock, TensorContext
from streammerge.methods.scaled import add_scaled

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmeticExpert(ExpertParameters):
    coefficient: float = Field(0.7, description="merge coefficient of this fine-tuned model")


class TaskArithmetic(Method):
    """The base plus the scaled task vectors:

        theta = theta_0 + sum_i c_i (theta_i - theta_0)

    Convention: no normalisation. The default coefficient 0.7 is the one long-to-short merging uses for one
    reasoning model at every size (arXiv 2503.20641, table 7); several experts usually want less each.
    Reference: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
    """

    Expert = TaskArithmeticExpert
    summary = "base plus scaled task vectors"
    reference = "arXiv 2212.04089"

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        return add_scaled(block.base, block.task_vectors, [expert.coefficient for expert in self.experts])

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": [expert.coefficient for expert in self.experts]}
