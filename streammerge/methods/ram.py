"""Reinforced Agent Merging: average what several models changed, keep what only one did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from streammerge.methods.api import Method, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class RamParameters(Strict):
    epsilon: float = Field(1e-5, ge=0, description="differences from the base up to this count as no change")


class RamPlusTlParameters(RamParameters):
    r: float = Field(0.1, ge=0, description="what is added to the factor per unit of the overlap ratio")
    alpha: float = Field(0.2, ge=0, description="largest overlap ratio that counts")


class RamExpert(Strict):
    """A fine-tuned model has no parameters of its own here."""


class Ram(Method):
    """Average each entry over the models that changed it; with d_i = theta_i - theta_0:

        A_i = [|d_i| > epsilon];   theta = theta_0 + sum_i A_i d_i / max(1, sum_i A_i)

    So what one model alone changed is not diluted by the others. Reinforcement learning leaves such sparse, hardly
    overlapping task vectors; densely fine-tuned models overlap everywhere and are just averaged.

    Convention: as mergekit's `ram`: no weights, and `epsilon` is absolute. An entry nobody changed keeps the base's
    bits; one that is NaN in a fine-tuned model counts as not changed.
    Reference: Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, arXiv 2601.13572.
    """

    Parameters: ClassVar[type[Strict]] = RamParameters
    Expert = RamExpert
    summary = "mean over the models that changed an entry"
    reference = "arXiv 2601.13572"

    parameters: RamParameters

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        vectors, active, counts = _changes(block, self.parameters.epsilon)
        total = None
        for vector, mask, factor in zip(vectors, active, self._factors(results), strict=True):
            part = vector.masked_fill(~mask, 0.0)
            if factor != 1:
                part = (part * factor).where(counts == 1, part)
            total = part if total is None else total + part
        assert total is not None  # there is at least one expert
        return (block.base + total / counts.clamp(min=1)).where(counts > 0, block.base)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": self._factors(results)}

    def _factors(self, results: Results) -> list[float]:
        """Per model, what its own changes are multiplied by."""
        return [1.0] * len(self.experts)


class RamPlusTl(Ram):
    """As `ram`, where what a model alone changed is enlarged by how much of its changes it shares, to make up for what
    averaging takes from the others:

        rho_i = (entries that model i and others changed) / (entries that model i alone changed)
        lambda_i = 1 + r min(rho_i, alpha);   theta = theta_0 + lambda_i d_i where A_i = 1 alone, else as `ram`

    Convention: as mergekit's `ramplus_tl`: rho_i is of each tensor ("tensor-local"); the paper's RAM+ has one for the
    whole model. The report's `coefficient` is lambda_i; a model that changed nothing alone has the largest, which then
    multiplies nothing (mergekit: likewise). Everything stays in the base's compute dtype, where mergekit's lambda turns
    the output into float32.
    Reference: Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, arXiv 2601.13572.
    """

    Parameters = RamPlusTlParameters
    summary = "as ram, what one model alone changed enlarged by its overlap"

    parameters: RamPlusTlParameters

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [_Overlaps(self.parameters.epsilon, len(self.experts))]

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        shared, unique = results["overlaps"]
        return {**super().report(tensor, results), "shared": shared, "unique": unique}

    def _factors(self, results: Results) -> list[float]:
        shared, unique = results["overlaps"]
        r, alpha = self.parameters.r, self.parameters.alpha
        return [1 + r * min(s / max(u, 1), alpha) if s or u else 1.0 for s, u in zip(shared, unique, strict=True)]


class _Overlaps(Pass):
    """Per model, how many entries it changed that others changed too, and how many alone."""

    name = "overlaps"

    def __init__(self, epsilon: float, experts: int) -> None:
        self.epsilon, self.experts = epsilon, experts

    def start(self, unit: Unit, done: Results) -> Any:
        return [0] * self.experts, [0] * self.experts

    def update(self, state: Any, block: RowBlock) -> None:
        shared, unique = state
        _, active, counts = _changes(block, self.epsilon)
        alone = counts == 1
        for i, mask in enumerate(active):
            own = int((mask & alone).count_nonzero())
            unique[i] += own
            shared[i] += int(mask.count_nonzero()) - own

    def finish(self, state: Any) -> tuple[list[int], list[int]]:
        shared, unique = state
        return shared, unique


def _changes(block: RowBlock, epsilon: float) -> tuple[Sequence[Tensor], list[Tensor], Tensor]:
    """The task vectors, where each changes the base, and by how many models an entry is changed, m + 1 times [r, c]."""
    vectors = block.task_vectors
    active = [vector.abs() > epsilon for vector in vectors]
    counts = active[0].to(vectors[0].dtype)
    for mask in active[1:]:
        counts = counts + mask
    return vectors, active, counts
