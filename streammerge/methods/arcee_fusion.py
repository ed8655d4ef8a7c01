"""Arcee Fusion: take over the entries whose importance is an outlier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.methods.api import Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.selection import order_statistic_passes
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8  # added to every probability


class ArceeFusionExpert(Strict):
    """The fine-tuned model has no parameters of its own here."""


class ArceeFusion(Method):
    """The fine-tuned model's value where it is important, the base's elsewhere:

        p_r, q_r = softmax of row r of theta_1 and of theta_0, plus 1e-8;   K_r = sum_j p_rj log(p_rj / q_rj)
        importance I_rj = |theta_1 - theta_0|_rj K_r;   threshold t = median(I) + 1.5 (q_75(I) - q_25(I))
        theta = theta_1 where I >= t, else theta_0

    Convention: as mergekit's `arcee_fusion`. A row is what shares all indices but the last, a vector is one row. The
    median and the quartiles are those of all entries of a tensor, linear between neighbours; mergekit takes the lower
    neighbour and, where a tensor has more than a million entries, those of a random sample. Divergences are summed in
    float64, importances are float32. The fine-tuned value is taken as it is (mergekit: base plus difference, in float32
    whatever the output should be). Rows of one entry have no divergence: such tensors are taken whole. Entries whose
    importance is NaN stay the base's.
    Reference: Arcee, https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration

    Raises:
        RecipeError: more than one fine-tuned model.
    """

    Expert = ArceeFusionExpert
    summary = "take over the entries whose importance is an outlier"
    reference = (
        "https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration"
    )
    most_experts = 1

    def __init__(self, parameters: Strict, experts: Sequence[ArceeFusionExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        if len(experts) != 1:
            raise RecipeError(f"method arcee_fusion takes one fine-tuned model, not {len(experts)}: choose ties")
        self._kept: dict[str, int] = {}

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return order_statistic_passes(_importance, _quartile_ranks, "neighbours") if unit.numel else []

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        mask = _importance(block).double() >= _threshold(results, block.tensor.numel)
        name = block.tensor.name  # counted for the report alone: row blocks come in order, a tensor has one thread
        self._kept[name] = (self._kept[name] if block.row else 0) + int(mask.count_nonzero())
        return block.experts[0].where(mask, block.base)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        threshold = _threshold(results, tensor.numel)
        kept = self._kept.get(tensor.name, 0)  # an empty tensor has no rows to apply to
        return {"coefficient": [1.0], "kept": kept, "threshold": threshold if math.isfinite(threshold) else None}


def _importance(block: RowBlock) -> Tensor:
    """I [r, c], float32."""
    p, q = (model.double().softmax(1).add_(_EPSILON) for model in (block.experts[0], block.base))
    divergence = q.div_(p).log_().neg_().mul_(p).sum(1, keepdim=True).clamp_(min=0.0)  # below 0 is rounding
    return block.task_vectors[0].abs().float() * divergence.float()


def _quartile_ranks(numel: int) -> list[int]:
    """The ranks below and above each quartile."""
    below = [k * (numel - 1) // 4 for k in (1, 2, 3)]
    return [rank for lower in below for rank in (lower, min(lower + 1, numel - 1))]


def _threshold(results: Results, numel: int) -> float:
    """t, from the importances at `_quartile_ranks`; NaN, which nothing reaches, for an empty tensor."""
    if not numel:
        return math.nan
    values = results["neighbours"]
    pairs = zip(values[::2], values[1::2], strict=True)
    first, median, third = (
        lower + (k * (numel - 1) % 4) / 4 * (upper - lower) for k, (lower, upper) in enumerate(pairs, 1)
    )
    return float(median + 1.5 * (third - first))
