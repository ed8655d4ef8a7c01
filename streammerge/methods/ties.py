"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.methods.api import ExpertParameters, Method, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.indicators import above, at_least, equal, one_for_zero, scaled, unequal
from streammerge.methods.selection import top_k_passes
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class TiesParameters(Strict):
    scale: float = Field(1.0, description="factor on the merged task vector (the paper's lambda)")
    normalize: bool = Field(True, description="divide by the coefficients that agree; off: plain sum")


class TiesExpert(ExpertParameters):
    density: float = Field(0.2, ge=0, le=1, description="fraction of each tensor's task vector that is kept")


class Ties(Method):
    """Trim each task vector to its largest entries, elect a sign per element, average what agrees:

        d_i = top-k of |theta_i - theta_0|, k = round(density_i * n);  y_i = c_i d_i;  S = sign(sum_i y_i)
        theta = theta_0 + scale * sum_{i: sign(y_i) = S} y_i / sum_{i: sign(y_i) = S} c_i

    Convention: three formulas are called TIES. Here, as in mergekit, the sign is elected on the scaled task
    vectors, zero counts as +, and the divisor is the sum of the agreeing coefficients; trimmed entries never
    agree. Density is per tensor. Exactly k entries are kept, ties in flat-index order (mergekit: k rounds down,
    but not to 0; ties fall as its sort likes). With one expert and coefficient c the divisor cancels c: use `scale`.
    Reference: Yadav et al., TIES-Merging, arXiv 2306.01708.
    """

    Parameters = TiesParameters
    Expert = TiesExpert
    summary = "trim by magnitude, elect sign, disjoint mean"
    reference = "arXiv 2306.01708"

    parameters: TiesParameters

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return top_k_passes(lambda block: block.task_vectors, [expert.density for expert in self.experts])

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        selections = results["selection"]
        vectors = []
        for vector, selection, expert in zip(block.task_vectors, selections, self.experts, strict=True):
            vectors.append(scaled(selection.trimmed(vector, block.offset), expert.coefficient))
        divisors = [expert.coefficient for expert in self.experts] if self.parameters.normalize else None
        return block.base + scaled(disjoint_merge(vectors, divisors), self.parameters.scale)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {
            "coefficient": [expert.coefficient for expert in self.experts],
            "kept": [selection.kept for selection in results["selection"]],
        }


def disjoint_merge(
    vectors: Sequence[Tensor], divisors: Sequence[float] | None, positive: Tensor | None = None
) -> Tensor:
    """Elect a sign per element and merge the entries that have it.

        S = sign(sum_i y_i), zero counts as +;   sum_{i: sign(y_i) = S} y_i / sum_{i: sign(y_i) = S} c_i

    Args:
        vectors: y, m times [r, c], scaled task vectors; exact zeros never agree.
        divisors: c per vector (1 each: divide by the count); None: do not divide.
        positive: 1 where S is +, else 0; None: it is elected by the vectors, as above.
    """
    if positive is None:
        if len(vectors) == 1 and (divisors is None or divisors[0] > 0):  # it agrees with itself wherever it is not 0
            return vectors[0] if divisors is None or divisors[0] == 1 else vectors[0] / divisors[0]
        positive = elects_plus(vectors)
    merged = divisor = None
    for i, vector in enumerate(vectors):
        agrees = equal(above(vector, 0), positive).mul_(unequal(vector, 0))
        part = vector * agrees
        merged = part if merged is None else merged.add_(part)
        if divisors is not None:
            share = agrees.mul_(divisors[i])
            divisor = share if divisor is None else divisor.add_(share)
    assert merged is not None  # there is at least one expert
    if divisor is not None:
        merged.div_(one_for_zero(divisor))
    return merged


def elects_plus(vectors: Sequence[Tensor]) -> Tensor:
    """1 where the sum of the vectors is not negative, else 0, [r, c]."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return at_least(total, 0)
