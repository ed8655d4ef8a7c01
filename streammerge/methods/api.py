"""What a merge method is: zero or more passes over the row blocks of a unit, then one apply.

The engine reads; a method only ever sees a row block: some rows of one tensor, in every input. It cannot
tell whether the tensor was read once and kept, or again for every pass, and its result must not depend on
how the rows are cut. Methods are pure tensor code without I/O, and import no torch themselves, so that
headers can be planned without it.

Shapes: a tensor of shape [..., c] is seen as a matrix [r, c]; a vector is one row. `m` experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from streammerge.calibration.store import Calibrated, Measurement
from streammerge.fisher.store import FisherRecord
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor, dtype

TILE_ELEMENTS = 1 << 17  # rows are cut into tiles of about this many elements: float32 temporaries stay in cache

Results = Mapping[str, Any]


@dataclass(frozen=True)
class TensorContext:
    """What a method may know of a tensor besides its values.

    Attributes:
        name: its name in the base checkpoint.
        shape: its shape.
        dtype: safetensors name of its dtype in the base, which is also the output's.
        block: the decoder block it lies in, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int | None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    @cached_property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @cached_property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def tile_rows(self) -> int:
        """Rows worked on at a time. A function of the shape alone, so that sums are cut the same way always."""
        return max(1, min(self.rows, TILE_ELEMENTS // max(self.columns, 1)))


@dataclass(frozen=True)
class Unit:
    """Tensors that share their passes: one tensor, or all that a method pools (see `Method.unit_of`)."""

    key: str
    tensors: tuple[TensorContext, ...]

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)


class RowBlock:
    """Some rows of one tensor in every input, converted to the compute dtype when first looked at.

    Values must not be changed in place, they may be the engine's read buffer. The results of an operation
    are the method's own.

    Attributes:
        tensor: the tensor the rows belong to.
        row: the first row's number in the tensor.
        offset: flat index of the first element within the unit.
        stored: the rows of the base and of every expert in their own dtypes.
    """

    def __init__(
        self,
        tensor: TensorContext,
        tensor_offset: int,
        row: int,
        stored: Sequence[Tensor],
        fishers: Sequence[Tensor],
        compute: dtype,
    ) -> None:
        self.tensor, self.row, self.stored = tensor, row, stored
        self.offset = tensor_offset + row * tensor.columns
        self._fishers, self._compute = fishers, compute

    @cached_property
    def base(self) -> Tensor:
        """[r, c], the base model's values."""
        return self.stored[0].to(self._compute)

    @cached_property
    def experts(self) -> list[Tensor]:
        """m times [r, c], the fine-tuned models' values."""
        return [expert.to(self._compute) for expert in self.stored[1:]]

    @cached_property
    def task_vectors(self) -> list[Tensor]:
        """m times [r, c]: fine-tuned minus base."""
        return [self._less_base(expert) for expert in self.stored[1:]]

    @cached_property
    def fishers(self) -> list[Tensor]:
        """[r, c] each: the diagonal Fishers that the method asked for, the base's first."""
        return [fisher.to(self._compute) for fisher in self._fishers]

    def _less_base(self, stored: Tensor) -> Tensor:
        values = stored.to(self._compute)
        return values - self.base if values is stored else values.sub_(self.base)  # what was converted is ours

    @property
    def fisher(self) -> Tensor:
        """[r, c], the base model's diagonal Fisher; only where the method asked for it."""
        if not self.fishers:
            raise RuntimeError(f"no Fisher was read for {self.tensor.name!r}")  # a bug of ours
        return self.fishers[0]


class Pass(ABC):
    """A reduction of a unit's row blocks to a small result.

    Attributes:
        name: key of the result; a later pass of the same name refines it.
        reads_fisher: whether a survey's row blocks come with the Fisher.
        reads_rows: whether it looks at all row blocks.
        spare: whether it is only needed where a sample misled.
        samples: whether it looks at some rows only, evenly spread, where they are at hand. They come a tile's worth at
            a time: their numbers and offsets mean nothing.
    """

    name: str
    reads_fisher: bool = False
    reads_rows: bool = True
    spare: bool = False
    samples: bool = False

    def workspace(self, unit: Unit) -> int:
        """Bytes its state takes, where they are more than a tile's."""
        return 0

    @abstractmethod
    def start(self, unit: Unit, done: Results) -> Any | None:
        """The initial state; None where there is nothing to measure (the pass is skipped, `done` stays)."""

    @abstractmethod
    def update(self, state: Any, block: RowBlock) -> None:
        """Take one row block into the state. Blocks come in order, each exactly once."""

    @abstractmethod
    def finish(self, state: Any) -> Any:
        """The result."""


class ExpertParameters(Strict):
    """Parameters every fine-tuned model may have its own value of."""

    coefficient: float = Field(1.0, description="merge coefficient of this fine-tuned model")


@dataclass(frozen=True)
class ModelFacts:
    """What a method may know of the model before any data is read."""

    parameters: int
    experts: tuple[str, ...]
    calibration_rows: int = 256  # of every model's inputs, where they are measured


class Method(ABC):
    """One merge method with its parameters. Subclasses are the rows of METHODS.

    Args:
        parameters: an instance of the class's `Parameters`.
        experts: an instance of the class's `Expert` per fine-tuned model, in the recipe's order.
        model: facts about the model.
    """

    Parameters: ClassVar[type[Strict]] = Strict
    Expert: ClassVar[type[Strict]] = ExpertParameters
    summary: ClassVar[str]
    reference: ClassVar[str]
    fewest_experts: ClassVar[int] = 1  # how many fine-tuned models it merges; the constructor refuses others
    most_experts: ClassVar[int | None] = None
    fisher_of_experts: ClassVar[bool] = False  # whether `needs_fisher` means that of every model, not the base's alone

    def __init__(self, parameters: Any, experts: Sequence[Any], model: ModelFacts) -> None:
        self.parameters, self.experts, self.model = parameters, tuple(experts), model

    @property
    def needs_fisher(self) -> bool:
        """Whether the base's diagonal Fisher must be at hand."""
        return False

    @property
    def calibration(self) -> tuple[Measurement, ...]:
        """What must be measured on calibration text before the merge.

        What is measured of single tensors is in `results["calibrated"]` of their passes and apply (`Calibrated.of`).
        """
        return ()

    def workspace(self, tensor: TensorContext) -> int:
        """Bytes the method holds for the tensor besides its row blocks' temporaries and the state of its passes."""
        return 0

    def merges(self, tensor: TensorContext) -> bool:
        """Whether the tensor is merged; if not, the base's bytes are copied."""
        return True

    def unit_of(self, tensor: TensorContext) -> str:
        """Tensors with the same key share their passes."""
        return tensor.name

    def reads_fisher(self, tensor: TensorContext) -> bool:
        """Whether row blocks of the tensor come with the diagonal Fisher."""
        return False

    def survey(self, tensor: TensorContext) -> Pass | None:
        """A pass over the tensor before anything is merged, where coefficients depend on the whole model."""
        return None

    def prepared(
        self, surveys: Mapping[TensorContext, Any], fishers: Sequence[FisherRecord], calibrated: Calibrated | None
    ) -> Self:
        """This method knowing all that was measured before the merge.

        Args:
            surveys: the result of every survey.
            fishers: the records of the Fishers it needs, the base's first.
            calibrated: what was measured on calibration text, where it asked for it.
        """
        return self

    def recalled(self, coefficients: Mapping[str, Sequence[float]], tensors: Sequence[TensorContext]) -> Self | None:
        """This method knowing what a merge by it reported, instead of what `prepared` is told.

        Args:
            coefficients: of each tensor that was merged, by name, one for each fine-tuned model.
            tensors: those that have a survey.

        Returns:
            None where the coefficients are not all that is measured before the merge.
        """
        return None

    def passes(self, unit: Unit) -> Sequence[Pass]:
        """The passes over a unit, in order."""
        return ()

    @abstractmethod
    def apply(self, block: RowBlock, results: Results) -> Tensor:
        """The merged rows [r, c], from the inputs' rows and the results of the passes, by name."""

    @abstractmethod
    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        """The tensor's entry in the manifest."""

    def block_table(self) -> list[dict[str, Any]]:
        """The manifest's `blocks`: one row per decoder block (and expert), for methods that have one."""
        return []


def coefficient_rows(experts: Sequence[str], by_block: Sequence[Mapping[int, float]]) -> list[dict[str, Any]]:
    """A block table of merge coefficients alone: model by model, block by block; named where there are several."""
    return [
        {"block": block, "alpha": alpha} | ({"expert": expert} if len(experts) > 1 else {})
        for expert, coefficients in zip(experts, by_block, strict=True)
        for block, alpha in sorted(coefficients.items())
    ]
