"""RegMean: the linear layer whose outputs are nearest to those of all models, each on its own inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.calibration.store import Measurement
from streammerge.errors import RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class RegmeanParameters(Strict):
    base_coefficient: float = Field(1.0, ge=0, description="weight of the base model; 0 leaves it out")
    off_diagonal: float = Field(
        0.9, ge=0, lt=1, description="factor on the Gram matrices' entries off the diagonal; 0 keeps the diagonal alone"
    )


class RegmeanExpert(ExpertParameters):
    coefficient: float = Field(1.0, ge=0, description="weight of this fine-tuned model")


class Regmean(Method):
    """Least squares over the inputs of every linear layer, W [rows, c] and X_i [n_i, c] the inputs in model i:

        W = argmin sum_i a_i |X_i W^T - X_i W_i^T|^2 = (sum_i a_i W_i G_i) (sum_i a_i G_i)^-1
        G_i = s X_i^T X_i / n_i + (1 - s) diag(X_i^T X_i / n_i),   s = off_diagonal

    No c x c matrix is ever formed: with D the diagonal part of S = sum_i a_i G_i and Z the rows sqrt(s a_i / n_i) X_i
    of all models, S = D + Z^T Z, and its inverse is that of a matrix with a row per token (Woodbury):

        S^-1 = D^-1 - D^-1 Z^T (1 + Z D^-1 Z^T)^-1 Z D^-1

    Convention: a_i are the coefficients over their sum, the base's among them, as in `linear`. Computed around the
    base, W = W_0 + (sum_i a_i (W_i - W_0) G_i) S^-1, in float64. Inputs are `--calibration-rows` tokens, evenly spread
    over each model's text; the paper's Gram matrices are over whole data sets (of sums, not means: the same where all
    have as many tokens), and its off-diagonal factor is 0.9 for most models. Tensors of no linear layer, a tied
    embedding, and experts that no token reached are averaged with a_i; a channel that is 0 on all tokens too. The
    factor off the diagonal is below 1: with fewer tokens than channels there would be no inverse.
    Reference: Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849.

    Raises:
        RecipeError: no calibration text, or the coefficients sum to zero.
    """

    Parameters = RegmeanParameters
    Expert = RegmeanExpert
    summary = "least squares on the inputs of every linear layer"
    reference = "arXiv 2212.09849"

    parameters: RegmeanParameters

    def __init__(self, parameters: RegmeanParameters, experts: Sequence[RegmeanExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        coefficients = [parameters.base_coefficient, *(expert.coefficient for expert in experts)]
        total = math.fsum(coefficients)
        if total == 0:
            raise RecipeError("method regmean: the coefficients sum to 0; give at least one model a weight")
        self._weights = [coefficient / total for coefficient in coefficients]

    @property
    def calibration(self) -> tuple[Measurement, ...]:
        return ("inputs",)

    def workspace(self, tensor: TensorContext) -> int:
        rows = self.model.calibration_rows * len(self._weights)
        of_rows = tensor.tile_rows * (10 * tensor.columns + 2 * rows)  # temporaries of a row block, in float64
        return 10 * rows * tensor.columns + 8 * (3 * rows * rows + of_rows) if tensor.is_matrix else 0

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [_Solve(self._weights, self.parameters.off_diagonal)]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        solved: _Solved | None = results.get("regression")
        change = block.task_vectors[0] * self._weights[1]
        for vector, weight in zip(block.task_vectors[1:], self._weights[2:], strict=True):
            change = change + vector * weight
        if solved is None:
            return block.base + change
        return block.base + solved.change(block.task_vectors, change)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        solved: _Solved | None = results.get("regression")
        return {"coefficient": self._weights[1:], "tokens": 0 if solved is None else solved.tokens}


class _Solved:
    """S^-1 ready to be applied to rows, and the G_i; holds one float64 row per token.

    Args:
        inputs: X_i of the base and every expert, [n_i, c].
        weights: a_i.
        off_diagonal: s.
    """

    def __init__(self, inputs: Sequence[Tensor], weights: Sequence[float], off_diagonal: float) -> None:
        import torch

        self._counts = [len(x) for x in inputs]
        self.tokens = sum(self._counts)
        shares = [weight / max(count, 1) for weight, count in zip(weights, self._counts, strict=True)]
        z = torch.empty(self.tokens, inputs[0].shape[-1], dtype=torch.float64)
        self._diagonals = []  # (1 - s) a_i diag(X_i^T X_i / n_i)
        for x, rows, share in zip(inputs, z.split(self._counts), shares, strict=True):
            rows.copy_(x)
            self._diagonals.append(torch.linalg.vecdot(rows, rows, dim=0) * (share * (1 - off_diagonal)))
            rows *= math.sqrt(share * off_diagonal)
        self._total = self._diagonals[0].clone()  # D
        for diagonal in self._diagonals[1:]:
            self._total += diagonal
        self._inverse = torch.where(self._total > 0, 1 / self._total, 0.0)
        half = self._inverse.sqrt()  # in two steps, without a second copy of Z
        z *= half
        inner = z @ z.T
        inner.diagonal().add_(1.0)
        self._core = torch.cholesky_inverse(torch.linalg.cholesky(inner))  # (1 + Z D^-1 Z^T)^-1
        z *= half
        self._scaled = z  # Z D^-1

    def change(self, vectors: Sequence[Tensor], average: Tensor) -> Tensor:
        """(sum_i a_i d_i G_i) S^-1 of some rows [r, c]; the average where a channel is 0 on all tokens."""
        import torch

        scaled = self._scaled.split(self._counts)[1:]
        straight = torch.zeros_like(average, dtype=torch.float64)  # sum_i a_i d_i G_i D^-1
        for vector, rows, diagonal in zip(vectors, scaled, self._diagonals[1:], strict=True):
            wide = vector.double()
            straight += wide * (diagonal * self._inverse)
            straight += ((wide * self._total) @ rows.T) @ rows
        found = straight - (((straight * self._total) @ self._scaled.T) @ self._core) @ self._scaled
        return torch.where(self._total > 0, found.to(average.dtype), average)


class _Solve(Pass):
    """Prepares the inverse from what was measured; reads no row."""

    name = "regression"
    reads_rows = False

    def __init__(self, weights: Sequence[float], off_diagonal: float) -> None:
        self.weights, self.off_diagonal = weights, off_diagonal

    def start(self, unit: Unit, done: Results) -> Any:
        inputs = done["calibrated"][unit.tensors[0].name].get("inputs", ())
        usable = len(inputs) == len(self.weights) and any(len(x) for x in inputs)
        return inputs if usable else None

    def update(self, state: Any, block: RowBlock) -> None:
        raise AssertionError("reads no rows")

    def finish(self, state: Any) -> Any:
        return _Solved(state, self.weights, self.off_diagonal)
