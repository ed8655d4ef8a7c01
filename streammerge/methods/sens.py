"""Sens-Merging: a merge coefficient per decoder block and model, from gradients and from distances of logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from streammerge.calibration.store import Calibrated, Measurement, Sensitivity
from streammerge.fisher.store import FisherRecord
from streammerge.methods.api import ExpertParameters, ModelFacts, TensorContext, coefficient_rows
from streammerge.methods.scaled import ScaledTaskVectors
from streammerge.schema import Strict

if TYPE_CHECKING:
    pass

Tau = Literal["distance", "similarity"]


class SensParameters(Strict):
    temperature: float = Field(2.0, gt=0, description="temperature of the softmax over the models; larger: evener")
    tau: Tau = Field(
        "distance", description="what favours a model: the distance of its logits from the others', or similarity"
    )


class SensExpert(ExpertParameters):
    coefficient: float = Field(0.7, description="merge coefficient of this fine-tuned model")


class Sens(ScaledTaskVectors):
    """Task arithmetic whose coefficients are scaled per decoder block l and model i, of K models with the base:

        S_il = mean over the samples of i's text of sum |w dL/dw|, over the weights w of the block's matrices
        alpha_il = S_il / sqrt(sum_l S_il^2)
        g_ij = mean over the tokens of j's text of |logits_i - logits_j|;   tau_i = sum_j g_ij / sum_ij g_ij
        sigma_il = exp(alpha_il tau_i / T) / sum_k exp(alpha_kl tau_k / T)
        theta = theta_0 + sum_i K sigma_il c_i (theta_i - theta_0)

    L is the negative log-likelihood of a sample's next tokens, in nats. tau `similarity` takes the complement,
    (1 - tau_i) / (K - 1), which sums to 1 too. The larger T, the nearer to task arithmetic; at T = 2, with two models
    and one text for both, K sigma is within 0.876 and 1.124.

    Convention: the formula is second-hand. Neither the paper's text nor the authors' code was at hand: this is what a
    third party's re-implementation computes, which agrees with the paper's abstract. The sign of tau is unverified: in
    that re-implementation a model far from the others counts more; whether the authors mean the distance or a
    similarity is open (they say that models which enhance the others are preferred), hence the parameter. The base
    takes part in the softmax, as in long-to-short merging (arXiv 2503.20641); its own task vector is zero. That paper's
    settings, table 7: coefficient 0.4 and T 3 at 1.5B, 0.7 and 2 at 7B (the defaults), 0.8 and 6 at 14B, on 100 samples
    of s1K, the reasoning model's with quick answers and the base's with slow ones: give `--calibration` once per model,
    or once for all. Biases and norms take their block's scale; everything outside the blocks takes the mean over the
    blocks. Where nothing tells models apart (no distance, no gradient), they count the same.
    Reference: Sens-Merging, arXiv 2502.12420.

    Raises:
        RecipeError: no calibration text.
        CheckpointError: a model whose logits cannot be walked in pieces.
    """

    Parameters = SensParameters
    Expert = SensExpert
    summary = "block coefficients from |weight * gradient| and distances of logits"
    reference = "arXiv 2502.12420"

    parameters: SensParameters

    def __init__(self, parameters: SensParameters, experts: Sequence[SensExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        self._by_block: list[dict[int, float]] = []  # K sigma of every expert

    @property
    def calibration(self) -> tuple[Measurement, ...]:
        return ("sensitivity",)

    def prepared(
        self, surveys: Mapping[TensorContext, Any], fishers: Sequence[FisherRecord], calibrated: Calibrated | None
    ) -> Self:
        assert calibrated is not None
        measured = calibrated.record.sensitivity
        assert measured is not None  # it is what was asked for
        known = copy.copy(self)
        known._by_block = block_scales(measured, self.parameters.temperature, self.parameters.tau)[1:]
        return known

    def block_table(self) -> list[dict[str, Any]]:
        by_block = [
            {block: expert.coefficient * scale for block, scale in scales.items()}
            for expert, scales in zip(self.experts, self._by_block, strict=True)
        ]
        return coefficient_rows(self.model.experts, by_block)

    def derived(self, tensor: TensorContext) -> list[float]:
        return [
            expert.coefficient
            * (math.fsum(scales.values()) / len(scales) if tensor.block is None else scales[tensor.block])
            for expert, scales in zip(self.experts, self._by_block, strict=True)
        ]


def block_scales(measured: Sensitivity, temperature: float, tau: Tau) -> list[dict[int, float]]:
    """K sigma of every model, the base first, and block; see `Sens`. Those of a block sum to K."""
    shares = model_shares(measured.distances, tau)
    exponents = []
    for blocks, share in zip(measured.blocks, shares, strict=True):
        norm = math.hypot(*blocks.values()) or 1.0
        exponents.append({block: value / norm * share for block, value in blocks.items()})
    scales: list[dict[int, float]] = [{} for _ in exponents]
    for block in measured.blocks[0]:
        column = [of_model[block] for of_model in exponents]
        odds = [math.exp((exponent - max(column)) / temperature) for exponent in column]
        for of_model, value in zip(scales, odds, strict=True):
            of_model[block] = len(odds) * value / math.fsum(odds)
    return scales


def model_shares(distances: Sequence[Sequence[float]], tau: Tau) -> list[float]:
    """tau of every model, from g: they sum to 1."""
    totals = [math.fsum(row) for row in distances]
    total, count = math.fsum(totals), len(totals)
    shares = [value / total if total > 0 else 1 / count for value in totals]
    return shares if tau == "distance" else [(1 - share) / (count - 1) for share in shares]
