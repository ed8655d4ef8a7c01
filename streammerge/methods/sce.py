"""SCE: select by variance, calculate coefficients from the energies, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods.api import Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import exact_sum, place_of
from streammerge.methods.selection import k_largest_passes
from streammerge.methods.ties import disjoint_merge, elects_plus
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class SceParameters(Strict):
    select_topk: float = Field(
        1.0, ge=0, le=1, description="fraction kept of the entries in which the task vectors differ, by variance"
    )


class SceExpert(Strict):
    """A fine-tuned model has no parameters of its own here."""


class Sce(Method):
    """Keep the entries where the m task vectors d_i = theta_i - theta_0 differ most, weigh each model by the energy
    of what is left of it, and merge what agrees with the elected sign:

        v = mean_i (d_i - mean_j d_j)^2;   d_i <- 0 outside the k largest of v, k = floor(select_topk * #(v != 0))
        a_i = mean(d_i^2) / sum_j mean(d_j^2);   S = sign(sum_i d_i), zero counts as +
        theta = theta_0 + sum_{i: sign(d_i) = S} a_i d_i / sum_{i: sign(d_i) = S} a_i

    Convention: as mergekit's `sce`: the sign is elected on the task vectors unweighted, zeros never agree, and the sum
    is divided by the agreeing coefficients; `select_topk` 1, the default, keeps everything (the paper keeps 10%).
    Exactly k entries are kept, equal variances in flat-index order. Variances (float32 at last) and energies are summed
    in float64. Where k is 0, which up to mergekit 0.1.4 added a dimension to the output, the tensor stays the base's;
    so does every entry nobody changes. The a_i are equal where all energies are 0 (mergekit: where their sum is below
    1e-6, which is most tensors of a lightly tuned model).
    Reference: Wan et al., FuseChat: Knowledge Fusion of Chat Models, arXiv 2408.07990.

    Raises:
        RecipeError: entries are to be selected by the variance of one model.
        CheckpointError: a task vector is not finite.
    """

    Parameters = SceParameters
    Expert = SceExpert
    summary = "select by variance, weigh by energy, elect sign"
    reference = "arXiv 2408.07990"

    parameters: SceParameters

    def __init__(self, parameters: SceParameters, experts: Sequence[SceExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        if parameters.select_topk < 1 and len(experts) == 1:
            raise RecipeError(
                "method sce: one fine-tuned model has no variance to select by: leave out select_topk, or add a model"
            )

    def passes(self, unit: Unit) -> Sequence[Pass]:
        share, energies = self.parameters.select_topk, _Energies(self._selected, len(self.experts))
        if share == 1:
            return [energies]
        counts = k_largest_passes(lambda block: [_variance(block)], lambda unit, done: [int(share * done["differing"])])
        return [_Differing(), *counts, energies]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        vectors, coefficients = self._selected(block, results), _coefficients(results)
        scaled = [vector * coefficient for vector, coefficient in zip(vectors, coefficients, strict=True)]
        merged = disjoint_merge(scaled, coefficients, elects_plus(vectors))
        return (block.base + merged).where(merged != 0, block.base)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        entry: dict[str, Any] = {"coefficient": _coefficients(results)}
        return entry | {"kept": results["selection"][0].kept} if "selection" in results else entry

    def _selected(self, block: RowBlock, results: Results) -> Sequence[Tensor]:
        """The task vectors, zeroed where they differ too little."""
        if "selection" not in results:
            return block.task_vectors
        mask = results["selection"][0].mask(_variance(block), block.offset)
        return [vector * mask for vector in block.task_vectors]


class _Differing(Pass):
    """In how many entries the task vectors differ."""

    name = "differing"

    def start(self, unit: Unit, done: Results) -> Any:
        return [0]

    def update(self, state: Any, block: RowBlock) -> None:
        state[0] += int(_variance(block).count_nonzero())

    def finish(self, state: Any) -> int:
        (count,) = state
        return int(count)


class _Energies(Pass):
    """Per model, the sum of the squares of its task vector.

    Args:
        vectors: row block and results so far -> m times [r, c].
        experts: m.
    """

    name = "energies"

    def __init__(self, vectors: Callable[[RowBlock, Results], Sequence[Tensor]], experts: int) -> None:
        self.vectors, self.experts = vectors, experts

    def start(self, unit: Unit, done: Results) -> Any:
        return {"unit": unit, "done": done, "sums": [[] for _ in range(self.experts)]}

    def update(self, state: Any, block: RowBlock) -> None:
        for sums, vector in zip(state["sums"], self.vectors(block, state["done"]), strict=True):
            sums.extend(exact_sum(vector.double().square()))

    def finish(self, state: Any) -> list[float]:
        energies = [math.fsum(sums) for sums in state["sums"]]
        if not all(map(math.isfinite, energies)):
            raise CheckpointError(
                f"{place_of(state['unit'])}: a value is not finite (NaN or Inf), so the models have no coefficients; "
                "repair the model, or choose a method that needs none"
            )
        return energies


def _coefficients(results: Results) -> list[float]:
    energies = results["energies"]
    total = math.fsum(energies)
    return [energy / total if total else 1 / len(energies) for energy in energies]


def _variance(block: RowBlock) -> Tensor:
    """The population variance of the task vectors over the models, [r, c], float32.

    In float64 it is exactly 0 where all are equal, and the models' order is lost when it is rounded.
    """
    wide = [vector.double() for vector in block.task_vectors]
    mean = wide[0].clone()
    for vector in wide[1:]:
        mean += vector
    mean /= len(wide)
    total = (wide[0] - mean).square_()
    for vector in wide[1:]:
        total += (vector - mean).square_()
    return (total / len(wide)).float()
