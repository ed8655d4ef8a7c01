"""Fisher-weighted averaging: every element the mean of the models, weighted by how sure each is of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from streammerge.calibration.store import Calibrated
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.store import FisherRecord
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class FisherAverageParameters(Strict):
    base_coefficient: float = Field(1.0, ge=0, description="weight of the base model; 0 leaves it out")
    normalize_fishers: bool = Field(True, description="divide each model's Fisher by its global Euclidean norm")
    fisher_floor: float = Field(
        1e-6, ge=0, description="least value of the base's Fisher, as it is stored; 0: the Fisher as it is"
    )


class FisherAverageExpert(ExpertParameters):
    coefficient: float = Field(1.0, ge=0, description="weight of this fine-tuned model")


class FisherAverage(Method):
    """The average of all models, the base included, every element weighted by each model's own diagonal Fisher:

        theta = sum_i a_i F_i theta_i / sum_i a_i F_i,    a_i = c_i / ||F_i||,    ||F_i||^2 = sum over all of F_i^2

    F_0, the base's, is max(F_0, fisher_floor) here, so that the base decides where no model's Fisher says anything. The
    floor is in the units of the stored Fisher, the norm is that of F_0 without it. With a floor of 0, elements where no
    a_i F_i is positive are averaged with the c_i. Without normalize_fishers a_i = c_i.

    Convention: computed around the base, theta_0 + sum_i a_i F_i (theta_i - theta_0) / sum_i a_i F_i, in float64, where
    no product of a Fisher that float32 or bfloat16 can hold underflows; so are the norms. The decoder blocks' matrices
    have a Fisher and make up its norm; everything else is averaged with the c_i, as in `linear`. The floor of 1e-6, the
    division by the norms and the order of the two are the authors' code's, whose "target" model is the base here; a
    floor for the target alone favours it. Its Fisher is the expectation over labels, ours that of the log-likelihood of
    tokens (`streammerge fisher`), measured for each model on the same tokens.
    Reference: Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832.

    Raises:
        RecipeError: the coefficients sum to zero.
        CheckpointError: a Fisher to be divided by its norm is zero.
    """

    Parameters = FisherAverageParameters
    Expert = FisherAverageExpert
    summary = "average of all models, each element weighted by each model's Fisher"
    reference = "arXiv 2111.09832"
    fisher_of_experts = True

    parameters: FisherAverageParameters

    def __init__(
        self, parameters: FisherAverageParameters, experts: Sequence[FisherAverageExpert], model: ModelFacts
    ) -> None:
        super().__init__(parameters, experts, model)
        self._coefficients = [parameters.base_coefficient, *(expert.coefficient for expert in experts)]
        self._factors = self._coefficients  # a_i
        total = math.fsum(self._coefficients)
        if total == 0:
            raise RecipeError("method fisher_average: the coefficients sum to 0; give at least one model a weight")
        self._shares = [coefficient / total for coefficient in self._coefficients[1:]]

    @property
    def needs_fisher(self) -> bool:
        return True

    def reads_fisher(self, tensor: TensorContext) -> bool:
        return tensor.block is not None and tensor.is_matrix

    def survey(self, tensor: TensorContext) -> Pass | None:
        return _Squares() if self.parameters.normalize_fishers and self.reads_fisher(tensor) else None

    def prepared(
        self,
        surveys: Mapping[TensorContext, list[float]],
        fishers: Sequence[FisherRecord],
        calibrated: Calibrated | None,
    ) -> Self:
        if not surveys:
            return self
        known = copy.copy(self)
        known._factors = []
        for number, coefficient in enumerate(self._coefficients):
            norm = math.sqrt(math.fsum(squares[number] for squares in surveys.values()))
            if norm == 0:
                name = f"model {self.model.experts[number - 1]}" if number else "the base model"
                raise CheckpointError(
                    f"{name}: its Fisher is zero in every matrix of the decoder blocks, so it cannot be divided by its "
                    "norm; measure it on other tokens, or set normalize_fishers to false"
                )
            known._factors.append(coefficient / norm)
        return known

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        average = block.task_vectors[0] * self._shares[0]
        for vector, share in zip(block.task_vectors[1:], self._shares[1:], strict=True):
            average = average + vector * share
        if not self.reads_fisher(block.tensor):
            return block.base + average
        total = block.fishers[0].double().clamp(min=self.parameters.fisher_floor) * self._factors[0]
        change = block.base.new_zeros(block.base.shape, dtype=total.dtype)
        for vector, fisher, factor in zip(block.task_vectors, block.fishers[1:], self._factors[1:], strict=True):
            weight = fisher.double() * factor
            total += weight
            change += weight * vector
        known = (change / total).to(average.dtype)
        return block.base + known.where(total > 0, average)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": self._coefficients[1:] if self.reads_fisher(tensor) else self._shares}


class _Squares(Pass):
    """Sum of squares of every model's Fisher over a tensor, in float64."""

    name = "survey"
    reads_fisher = True

    def start(self, unit: Unit, done: Results) -> Any:
        return []

    def update(self, state: Any, block: RowBlock) -> None:
        state.append([fisher.double().square().sum(1).sum().item() for fisher in block.fishers])

    def finish(self, state: Any) -> list[float]:
        return [math.fsum(sums) for sums in zip(*state, strict=True)]
