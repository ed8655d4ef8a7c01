"""What the methods that drop entries of the task vectors share: combining what is left, and the rescales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.draws import stream_key, uniform
from streammerge.methods.indicators import count, scaled
from streammerge.methods.ties import disjoint_merge
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

Sparse = tuple["Tensor", "Tensor"]  # 1 where an entry is kept and 0 elsewhere, and the task vector without the rest


class SparseParameters(Strict):
    scale: float = Field(1.0, description="factor on the merged task vector (mergekit's lambda)")
    normalize: bool = Field(False, description="divide by the coefficients that agree; off: plain sum")


class SparseExpert(ExpertParameters):
    density: float = Field(0.2, ge=0, le=1, description="fraction of each tensor's task vector that is kept")


class SparseMethod(Method):
    """Thin every task vector out, then sum what is left, or elect a sign and merge what agrees:

        y_i = c_i * factor_i * sparse(theta_i - theta_0);   theta = theta_0 + scale * merge(y)

    Where no sign is elected, `normalize` divides the sum by that of the coefficients.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    elects: ClassVar[bool]

    parameters: SparseParameters
    experts: tuple[SparseExpert, ...]

    def __init__(self, parameters: SparseParameters, experts: Sequence[SparseExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        self._coefficients = [expert.coefficient for expert in self.experts]
        if parameters.normalize and not self.elects and sum(self._coefficients) == 0:
            raise RecipeError("the coefficients sum to 0; change them or set normalize to false")
        self._kept: dict[str, list[int]] = {}

    @abstractmethod
    def sparsify(self, expert: int, vector: Tensor, block: RowBlock, results: Results) -> Sparse:
        """The mask of the entries kept, and the rows [r, c] of the expert's task vector with the others zeroed."""

    def factors(self, results: Results) -> list[float] | None:
        """A factor per expert on what is kept of its task vector; None: there is none."""
        return None

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        factors = self.factors(results)
        vectors, kept = [], []
        for i, (vector, coefficient) in enumerate(zip(block.task_vectors, self._coefficients, strict=True)):
            mask, sparse = self.sparsify(i, vector, block, results)
            kept.append(count(mask))
            sparse = scaled(sparse, factors[i]) if factors is not None else sparse
            vectors.append(scaled(sparse, coefficient))
        self._count(block, kept)
        return block.base + scaled(self._merged(vectors), self.parameters.scale)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        kept = self._kept.get(tensor.name, [0] * len(self.experts))  # an empty tensor has no rows to apply to
        entry: dict[str, Any] = {"coefficient": self._coefficients, "kept": kept}
        factors = self.factors(results)
        return entry if factors is None else {**entry, "rescale": factors}

    def _merged(self, vectors: Sequence[Tensor]) -> Tensor:
        normalize = self.parameters.normalize
        if self.elects:
            return disjoint_merge(vectors, self._coefficients if normalize else None)
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return total / sum(self._coefficients) if normalize else total

    def _count(self, block: RowBlock, kept: list[int]) -> None:
        """Add up for the report how many are kept. The result of `apply` does not depend on it: counting what it
        draws anyway saves a pass. Row blocks come in order, and a tensor belongs to one thread."""
        name = block.tensor.name
        before = self._kept[name] if block.row else [0] * len(kept)
        self._kept[name] = [a + b for a, b in zip(before, kept, strict=True)]


class RandomParameters(SparseParameters):
    rescale: Literal["off", "density", "l1"] = Field(
        "density",
        description="make up for what is dropped: density (divide by the keep probability), l1 (restore the L1 norm), "
        "or off",
    )
    random_seed: int = Field(42, ge=0, description="seed of what is dropped")


class RandomExpert(SparseExpert):
    density: float = Field(0.7, ge=0, le=1, description="fraction of each tensor's task vector that is kept")


class RandomlySparseMethod(SparseMethod):
    """Entries are dropped at random, each with its own draw, the same however the rows are cut."""

    Expert = RandomExpert

    parameters: RandomParameters

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [L1Factors(self._before_and_after)] if self.parameters.rescale == "l1" else []

    def factors(self, results: Results) -> list[float] | None:
        return results["l1"] if self.parameters.rescale == "l1" else None

    def draws(self, expert: int, block: RowBlock) -> Tensor:
        """Uniform draws [r, c], one per entry of the block."""
        tensor = block.tensor
        key = stream_key(self.parameters.random_seed, tensor.name, expert)
        return uniform(key, block.row * tensor.columns, block.base.shape)

    def _before_and_after(self, block: RowBlock) -> Iterable[Sparse]:
        for i, vector in enumerate(block.task_vectors):
            yield vector, self.sparsify(i, vector, block, {})[1]


class L1Factors(Pass):
    """Per expert ||d||_1 / ||sparse d||_1, in float64; 1 where either is zero or not finite.

    Args:
        vectors: row block -> the task vector and its sparse form, per expert.
    """

    name = "l1"

    def __init__(self, vectors: Callable[[RowBlock], Iterable[Sparse]]) -> None:
        self.vectors = vectors

    def start(self, unit: Unit, done: Results) -> Any:
        return []

    def update(self, state: Any, block: RowBlock) -> None:
        state.append([[v.double().abs_().sum(1).sum().item() for v in pair] for pair in self.vectors(block)])

    def finish(self, state: Any) -> list[float]:
        factors = []
        for sums in zip(*state, strict=True):  # of one expert, over the blocks
            before, after = (math.fsum(parts) for parts in zip(*sums, strict=True))
            usable = 0 < before < math.inf and 0 < after < math.inf
            factors.append(before / after if usable else 1.0)
        return factors
