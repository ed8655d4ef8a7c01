"""Activation-guided consensus merging: a merge coefficient per block from mutual information."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from streammerge.calibration.store import Calibrated, Measurement
from streammerge.fisher.store import FisherRecord
from streammerge.methods.api import (
    ExpertParameters,
    ModelFacts,
    Pass,
    Results,
    RowBlock,
    TensorContext,
    Unit,
    coefficient_rows,
)
from streammerge.methods.scaled import ScaledTaskVectors
from streammerge.methods.selection import top_k_passes
from streammerge.methods.ties import disjoint_merge
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class AcmParameters(Strict):
    theta: float = Field(0.7, ge=0, description="steepness of the sigmoid over the samples' mutual information")


class AcmTiesExpert(ExpertParameters):
    density: float = Field(0.2, ge=0, le=1, description="fraction of each tensor's task vector that is kept")


class AcmTa(ScaledTaskVectors):
    """Task arithmetic with a coefficient per decoder block l and expert k, by what its activations tell of the base's:

        t_lk = mean_i 1 / (1 + exp(-theta (I_ilk - max_j I_jlk)));   theta = theta_0 + sum_k c_k (1 - t_lk) d_k

    I_ilk the mutual information, in nats, between what the block's `down_proj` gives in the base and in expert k on
    sample i of a calibration text, both rounded to bfloat16, each value a class (`calibration.mutual_information`).
    t is in (0, 0.5], so the coefficient is in [0.5, 1): the evener the samples, the smaller.

    Convention: the maximum is over the samples of one block, not over the blocks. The same for the embedding, the final
    norm and a head of its own, by their outputs; other tensors outside the blocks take the embedding's. No code is
    published by the authors: this is what a third party's copy of their script computes. Their calibration is 100 texts
    of s1K; `--calibration-samples` and `--calibration-length` say how many here.
    Reference: Activation-guided consensus merging for large language models, arXiv 2505.14009.

    Raises:
        RecipeError: no calibration text.
    """

    Parameters = AcmParameters
    summary = "block coefficients from mutual information, on whole task vectors"
    reference = "arXiv 2505.14009"

    parameters: AcmParameters

    def __init__(self, parameters: AcmParameters, experts: Sequence[ExpertParameters], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        self._shares: list[dict[str, float]] = []

    @property
    def calibration(self) -> tuple[Measurement, ...]:
        return ("mutual_information",)

    def prepared(
        self, surveys: Mapping[TensorContext, Any], fishers: Sequence[FisherRecord], calibrated: Calibrated | None
    ) -> Self:
        assert calibrated is not None
        measured = calibrated.record.mutual_information
        assert measured is not None  # it is what was asked for
        known = copy.copy(self)
        known._shares = [
            {place: shared_part(nats, self.parameters.theta) for place, nats in of_expert.items()}
            for of_expert in measured
        ]
        return known

    def block_table(self) -> list[dict[str, Any]]:
        by_block = [
            {int(place): expert.coefficient * (1 - share) for place, share in shares.items() if place.isdigit()}
            for expert, shares in zip(self.experts, self._shares, strict=True)
        ]
        return coefficient_rows(self.model.experts, by_block)

    def derived(self, tensor: TensorContext) -> list[float]:
        place = place_of(tensor)
        return [
            expert.coefficient * (1 - shares.get(place, shares["embedding"]))
            for expert, shares in zip(self.experts, self._shares, strict=True)
        ]


class AcmTies(AcmTa):
    """The coefficients of `acm_ta` on task vectors that are trimmed and merged as in `ties`:

        y_k = c_k (1 - t_lk) top-k of |d_k|;   S = sign(sum_k y_k);   theta = theta_0 + mean of the y_k with sign S

    Convention: trim and election as `ties`, the agreeing ones averaged by their count, so that with one expert nothing
    cancels. The mutual information is that of each fine-tuned model with the base. In the script that is known, the
    model measured is the one merged by TIES: for that, merge by `ties` first, and give the result to `acm_ta` as the
    only fine-tuned model.
    Reference: Activation-guided consensus merging for large language models, arXiv 2505.14009.

    Raises:
        RecipeError: no calibration text.
    """

    Expert = AcmTiesExpert
    summary = "block coefficients from mutual information, trim by magnitude, elect sign, disjoint mean"

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return top_k_passes(lambda block: block.task_vectors, [expert.density for expert in self.experts])

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        vectors = []
        coefficients = self.coefficients(block.tensor)
        for vector, selection, coefficient in zip(block.task_vectors, results["selection"], coefficients, strict=True):
            vectors.append(selection.trimmed(vector, block.offset) * coefficient)
        return block.base + disjoint_merge(vectors, [1.0] * len(vectors))

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {**super().report(tensor, results), "kept": [selection.kept for selection in results["selection"]]}


def shared_part(nats: Sequence[float], theta: float) -> float:
    """t = mean_i 1 / (1 + exp(-theta (I_i - max I))), in (0, 0.5]."""
    most = max(nats)
    return math.fsum(1 / (1 + math.exp(min(theta * (most - value), 700.0))) for value in nats) / len(nats)


def place_of(tensor: TensorContext) -> str:
    """Under which name the mutual information of a tensor's module is measured."""
    if tensor.block is not None:
        return str(tensor.block)
    last = tensor.name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    if last in ("lm_head", "embed_out", "output"):
        return "head"
    return "norm" if "norm" in last or last == "ln_f" else "embedding"
