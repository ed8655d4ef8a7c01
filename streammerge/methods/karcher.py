"""The Karcher mean on the sphere: Fisher-Rao averaging that preserves norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import ANTIPODAL, Combination, Gram, GramPass, combine, models_of, place_of
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class KarcherParameters(Strict):
    base_coefficient: float = Field(1.0, ge=0, description="weight of the base model; 0 leaves it out")
    granularity: Literal["tensor", "block"] = Field(
        "tensor", description="what is one point on the sphere: each tensor, or a decoder block's tensors together"
    )
    max_iter: int = Field(1000, ge=0, description="most iterations; 0 gives the normalised mean times the mean norm")
    tol: float = Field(1e-12, gt=0, description="a step shorter than this, in rad, ends the iteration")
    precondition: bool = Field(False, description="measure lengths and angles of the blocks' matrices with the Fisher")


class KarcherExpert(ExpertParameters):
    coefficient: float = Field(1.0, ge=0, description="weight of this fine-tuned model")


class Karcher(Method):
    """The point on the sphere with the least sum of squared angles to the models, times their mean norm.

    With a_i the coefficients over their sum, n_i = |theta_i|, u_i = theta_i / n_i and u = sum a_i u_i / |sum a_i u_i|
    to begin with, repeat until |T| < tol:

        T = sum_i a_i (w_i / sin w_i) (u_i - cos w_i u),  w_i = the angle between u_i and u
        u <- cos|T| u + sin|T| T / |T|

        theta = (sum_i a_i n_i) u

    With `precondition`, all lengths and angles of the decoder blocks' matrices, the mean norm included, are those of
    <x, y>_F = sum F x y with the base's diagonal Fisher F. The other tensors have no Fisher and stay Euclidean.

    Every iterate is a linear combination of the u_i, so all of it runs on the models' Gram matrix: one pass reads the
    data, whatever the number of iterations. Angles come from distances between the models, so small ones keep their
    digits.

    Convention: the base takes part with `base_coefficient` (1), as in `linear`, so that `--base A --ft B` is the
    midpoint of A and B. The paper knows models only, none of them a base; mergekit averages a base model in as one
    more point although its documentation says otherwise. Weights are ours (mergekit: always equal), and `granularity`
    block is the paper's blockwise normalisation; with `precondition` it pools a block's matrices, and its other tensors
    are points of their own. `max_iter` is 1000 and `tol` 1e-12 (mergekit: 10 and 1e-5), because iterations cost nothing
    here; mergekit's cosines in bfloat16 round to 1 below some 0.06 rad, which leaves the normalised mean. The formula
    is that of mergekit's method, which the paper names as its code; the paper's optional diagonal Fisher
    preconditioning is not in it, and the reading above is ours. Where every model's length by F is 0, as of experts
    that no token reached, F says nothing and the metric is Euclidean; the report's `metric` tells. Zero tensors have no
    direction, they only count in the mean norm (mergekit also leaves out norms up to `tol`). A tensor of one element
    has a sign only: it gets the linear mean. Models more than pi - 0.001 rad from the mean, or whose mean vanishes, are
    an error (mergekit: takes the first, or divides by zero).
    Reference: Fisher-Rao (Karcher) merging, arXiv 2603.04972.

    Raises:
        RecipeError: the coefficients sum to zero.
        CheckpointError: models point in opposite directions.
    """

    Parameters = KarcherParameters
    Expert = KarcherExpert
    summary = "Karcher mean on the sphere, norms preserved"
    reference = "arXiv 2603.04972"

    parameters: KarcherParameters

    def __init__(self, parameters: KarcherParameters, experts: Sequence[KarcherExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        coefficients = [parameters.base_coefficient, *(expert.coefficient for expert in experts)]
        total = math.fsum(coefficients)
        if total == 0:
            raise RecipeError("method karcher: the coefficients sum to 0; give at least one model a weight")
        self._members = [i for i, coefficient in enumerate(coefficients) if coefficient]
        self._weights = [coefficients[i] / total for i in self._members]
        self._names = ["the base", *model.experts]

    @property
    def needs_fisher(self) -> bool:
        return self.parameters.precondition

    def unit_of(self, tensor: TensorContext) -> str:
        pooled = self.parameters.granularity == "block" and (not self.parameters.precondition or tensor.is_matrix)
        return f"block {tensor.block}" if pooled and tensor.block is not None else tensor.name

    def reads_fisher(self, tensor: TensorContext) -> bool:
        return self.parameters.precondition and tensor.block is not None and tensor.is_matrix

    def passes(self, unit: Unit) -> Sequence[Pass]:
        if not self.reads_fisher(unit.tensors[0]):
            return [GramPass(self._stored, self._solve)]
        by_fisher = GramPass(self._stored, self._solve_by_fisher, lambda block: block.fisher)
        return [by_fisher, _Otherwise(self._stored, self._solve)]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        return combine(self._vectors(block), results["combination"].coefficients)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        combination: Combination = results["combination"]
        by_input = dict(zip(self._members, combination.coefficients, strict=True))
        coefficients = [by_input.get(i, 0.0) for i in range(len(self._names))]
        return {"coefficient": coefficients[1:], "base_coefficient": coefficients[0], **combination.facts}

    def _vectors(self, block: RowBlock) -> list[Tensor]:
        models = models_of(block)
        return [models[i] for i in self._members]

    def _stored(self, block: RowBlock) -> list[Tensor]:
        return [block.stored[i] for i in self._members]

    def _solve_by_fisher(self, gram: Gram, unit: Unit) -> Combination | None:
        return self._solve(gram, unit, "fisher") if any(gram.squares) else None

    def _solve(self, gram: Gram, unit: Unit, metric: Literal["fisher", "euclidean"] = "euclidean") -> Combination:
        told = {"metric": metric} if self.parameters.precondition else {}
        if unit.numel <= 1:
            return Combination(tuple(self._weights), {"angle": None, "iterations": 0, "converged": True} | told)
        try:
            mean = karcher_mean(gram, self._weights, self.parameters.max_iter, self.parameters.tol)
        except Antipodal as error:
            who = "the models" if error.index is None else self._names[self._members[error.index]]
            raise CheckpointError(
                f"{place_of(unit)}: {who} and the mean of all point in opposite directions, so there is no Karcher "
                "mean; choose method linear, or other coefficients"
            ) from None
        facts = {"angle": gram.widest_angle, "iterations": mean.iterations, "converged": mean.converged}
        return Combination(mean.coefficients, facts | told)


class _Otherwise(GramPass):
    """The Euclidean Gram matrix, only where the Fisher had nothing to measure."""

    def start(self, unit: Unit, done: Results) -> Any | None:
        return super().start(unit, done) if done[self.name] is None else None


@dataclass(frozen=True)
class Mean:
    coefficients: tuple[float, ...]
    iterations: int
    converged: bool


class Antipodal(Exception):  # noqa: N818 - never leaves this module
    """The vector at `index` is opposite to the mean; None: the mean vanishes."""

    def __init__(self, index: int | None) -> None:
        super().__init__(index)
        self.index = index


def karcher_mean(gram: Gram, weights: Sequence[float], max_iter: int, tol: float) -> Mean:
    """The coefficients of the vectors in their Karcher mean times their mean norm.

    A combination p = sum x_i u_i is held as x alone. With Q_ij = |u_i - u_j|^2 and s = sum x,

        |p|^2 = s^2 - x'Qx / 2;   |u_i - p|^2 = (1 - s)^2 + (Qx)_i - x'Qx / 2   for |p| = 1

    Args:
        gram: of the vectors.
        weights: positive, summing to 1.
        max_iter: most iterations.
        tol: length of a step, in rad, that ends the iteration.

    Raises:
        Antipodal: there is no mean, or not one only.
    """
    present = [i for i, norm in enumerate(gram.norms) if norm]
    if not present:
        return Mean(tuple(weights), 0, True)
    total = math.fsum(weights[i] for i in present)
    a = [weights[i] / total for i in present]
    chords = [[gram.chord2(i, j) if i != j else 0.0 for j in present] for i in present]

    length = math.sqrt(max(_square(chords, a), 0.0))
    if length < ANTIPODAL / 2:
        raise Antipodal(None)
    x, iterations, converged = [value / length for value in a], 0, False
    while not converged and iterations < max_iter:
        step = _tangent(chords, a, x, present)
        length = math.sqrt(max(_square(chords, step), 0.0))
        if length < tol:
            converged = True
        else:
            iterations += 1
            cos, sinc = math.cos(length), math.sin(length) / length
            x = [cos * value + sinc * part for value, part in zip(x, step, strict=True)]
            length = math.sqrt(_square(chords, x))
            x = [value / length for value in x]

    scale = math.fsum(weight * norm for weight, norm in zip(weights, gram.norms, strict=True))
    coefficients = [0.0] * len(gram)
    for i, value in zip(present, x, strict=True):
        coefficients[i] = scale * value / gram.norms[i]
    return Mean(tuple(coefficients), iterations, converged)


def _square(chords: Sequence[Sequence[float]], x: Sequence[float]) -> float:
    """|sum x_i u_i|^2."""
    product = math.fsum(x[i] * _dot(row, x) for i, row in enumerate(chords))
    return math.fsum(x) ** 2 - product / 2


def _tangent(
    chords: Sequence[Sequence[float]], a: Sequence[float], x: Sequence[float], names: Sequence[int]
) -> list[float]:
    """The mean of the points' logarithms at the iterate x, as a combination of the points."""
    products = [_dot(row, x) for row in chords]
    quadratic, gap = _dot(products, x), math.fsum([1.0, *(-value for value in x)])
    pulls, along = [], []
    for i, weight in enumerate(a):
        chord2 = min(max(gap * gap + products[i] - quadratic / 2, 0.0), 4.0)
        chord = math.sqrt(chord2)
        angle, sine = 2 * math.asin(chord / 2), chord * math.sqrt(1 - chord2 / 4)
        if angle > math.pi - ANTIPODAL:
            raise Antipodal(names[i])
        pulls.append(weight * (angle / sine if sine else 1.0))
        along.append(pulls[i] * (1 - chord2 / 2))
    back = math.fsum(along)
    return [pull - back * value for pull, value in zip(pulls, x, strict=True)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))
