"""FIM-TIES and FIM-TA: a merge coefficient per decoder block from the diagonal Fisher information."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from streammerge.calibration.store import Calibrated
from streammerge.errors import CheckpointError
from streammerge.fisher.coefficients import Importance, Theta, merge_coefficients, score
from streammerge.fisher.store import FisherRecord
from streammerge.methods.api import ExpertParameters, Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gates import fused_gates, gate_rows, is_gate
from streammerge.methods.norms import OutputNorm
from streammerge.methods.selection import top_k_passes
from streammerge.methods.ties import disjoint_merge
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

Other = float | Literal["base", "mean", "finetuned"]


class FimParameters(Strict):
    importance: Importance = Field("product", description="block score: product, fim, norm or quadratic")
    theta: Theta = Field("adaptive", description="steepness of the sigmoid: adaptive, or a number")
    granularity: Literal["block", "tensor"] = Field("block", description="what gets one coefficient: block or tensor")
    trim: Literal["fisher", "quadratic", "magnitude", "none"] = Field(
        "fisher",
        description="what decides which entries are kept: fisher (F|d|), quadratic (F d^2), magnitude (|d|), or none",
    )
    trim_scope: Literal["tensor", "block"] = Field(
        "tensor", description="what shares one trim threshold: tensor or block"
    )
    gate_factor: float = Field(0.7, ge=0, description="factor on the coefficient of gate projections")
    norm_tolerance: float | Literal["off"] = Field(
        0.05, description="rescale a matrix whose output norm moved by more than this fraction, or off"
    )
    other: Other = Field(
        "base", description="coefficient outside the blocks: base (0), mean (of the blocks), finetuned (1), or a number"
    )

    @field_validator("theta", "norm_tolerance")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError("must not be negative")
        return value


class FimTaParameters(FimParameters):
    trim: Literal["fisher", "quadratic", "magnitude", "none"] = Field("none", description="see fim_ties; none")
    gate_factor: float = Field(1.0, ge=0, description="factor on the coefficient of gate projections")
    norm_tolerance: float | Literal["off"] = Field("off", description="see fim_ties; off")


class FimExpert(ExpertParameters):
    coefficient: float = Field(
        1.0, description="merge coefficient of this fine-tuned model; for fim_* a factor on its block coefficients"
    )
    density: float | Literal["auto"] = Field(
        "auto", description="fraction of each matrix that is kept; auto: 0.2 below 3 billion parameters, else 0.4"
    )

    @field_validator("density")
    @classmethod
    def _fraction(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError("must be between 0 and 1")
        return value


@dataclass(frozen=True)
class _Survey:
    """Per expert, over one tensor: sum of delta^2 and of F * delta^2."""

    squares: list[float]
    quadratic: list[float]


class FimTies(Method):
    """Fisher-guided TIES: block coefficients, Fisher-weighted trim, protected gates, calibrated norms.

    With d_i = theta_i - theta_0, F the base's diagonal Fisher on random tokens, per decoder block l and expert i:

        s_l = log(mean_l F * mean_l d_i^2);   alpha_l = 1 - sigmoid((s_l - max s) / (max s - min s))
        alpha_l * gate_factor for gate projections
        keep of each matrix the k = round(density * n) entries of d_i with the largest F |d_i|
        theta = theta_0 + alpha_l * kept entries of d_i
        times ||W_0 X|| / ||W X|| for a matrix W whose ||W X|| differs from the base's by more than 5%,
            X = 8 Gaussian probes

    Convention: means are pooled over the block's matrices by element count; biases and norm weights in a block
    take its alpha untrimmed and do not enter the score; everything outside the blocks stays the base's (`other`).
    A gate projection is a tensor named `gate_proj`, in experts and shared experts too, or `experts.N.w1`; and of
    a matrix `gate_up_proj` [..., 2 I, H], or a stack of them, the first I rows of every 2 I, where the `down_proj`
    beside it is [..., H, I]. Where it is not, the layout is unknown (some models transpose it) and nothing of it is
    protected; routers and the bias of a `gate_up_proj` are not either. Nothing is rescaled after the trim.
    Exactly k entries are kept, ties in flat-index order. With several experts each has its own alphas; the sign is
    elected on the scaled, trimmed task vectors (zero counts as +) and the agreeing ones are averaged by their count.
    Sums run in float64, all else in float32. A block without Fisher, task vector or matrices gets the coefficient of
    the least important scored block; equal scores give 0.5. With granularity `tensor`, biases and norm weights take
    the mean alpha of their block's matrices.
    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1; where it is ambiguous, the reading is the one above.

    Raises:
        CheckpointError: no decoder blocks are found, or a task vector is not finite.
    """

    Parameters: ClassVar[type[Strict]] = FimParameters
    Expert = FimExpert
    summary = "Fisher block coefficients, Fisher-weighted trim, protected gates, calibrated norms"
    reference = "arXiv 2603.21705"
    _elects: ClassVar[bool] = True  # elect a sign and average what agrees, or sum

    parameters: FimParameters

    def __init__(self, parameters: FimParameters, experts: Sequence[FimExpert], model: ModelFacts) -> None:
        automatic = 0.2 if model.parameters < 3_000_000_000 else 0.4
        resolved = [e.model_copy(update={"density": automatic}) if e.density == "auto" else e for e in experts]
        super().__init__(parameters, resolved, model)
        self._table: list[dict[str, Any]] = []
        self._by_block: list[dict[int, float]] = []
        self._by_tensor: list[dict[str, float]] = []
        self._fused: dict[str, int] = {}
        self._recalled: Mapping[str, Sequence[float]] | None = None

    @property
    def needs_fisher(self) -> bool:
        return self.parameters.importance != "norm" or self.parameters.trim in ("fisher", "quadratic")

    def merges(self, tensor: TensorContext) -> bool:
        return tensor.block is not None or self.parameters.other != "base"

    def unit_of(self, tensor: TensorContext) -> str:
        if self.parameters.trim_scope == "block" and self._trims(tensor):
            return f"block {tensor.block}"
        return tensor.name

    def reads_fisher(self, tensor: TensorContext) -> bool:
        return self.parameters.trim in ("fisher", "quadratic") and _is_block_matrix(tensor)

    def survey(self, tensor: TensorContext) -> Pass | None:
        if not _is_block_matrix(tensor):
            return None
        return _TaskVectorSquares(self.parameters.importance == "quadratic")

    def prepared(
        self,
        surveys: Mapping[TensorContext, _Survey],
        fishers: Sequence[FisherRecord],
        calibrated: Calibrated | None = None,
    ) -> Self:
        known = copy.copy(self)
        known._table, known._by_block, known._by_tensor = [], [], []
        known._fused = fused_gates(surveys)
        for expert, id in enumerate(self.model.experts):
            rows = _scores(surveys, fishers[0] if fishers else None, expert, self.parameters)
            for row in rows:
                if not math.isfinite(row["task_vector_mean_square"]):
                    raise CheckpointError(
                        f"model {id}: its task vector in decoder block {row['block']} is not finite (NaN or Inf), so "
                        "the block has no score; repair the model, or choose a method that needs none"
                    )
            alphas = merge_coefficients([row["score"] for row in rows], self.parameters.theta)
            factor = self.experts[expert].coefficient
            blocks: dict[int, list[float]] = {}
            for row, alpha in zip(rows, alphas, strict=True):
                row["alpha"] = alpha
                row["score"] = row["score"] if row["score"] > -math.inf else None
                if len(self.model.experts) > 1:
                    row["expert"] = id
                blocks.setdefault(row["block"], []).append(factor * alpha)
            known._table += rows
            known._by_block.append({block: math.fsum(values) / len(values) for block, values in blocks.items()})
            by_tensor = {row["tensor"]: factor * row["alpha"] for row in rows if "tensor" in row}
            known._by_tensor.append(by_tensor)
        return known

    def recalled(self, coefficients: Mapping[str, Sequence[float]], tensors: Sequence[TensorContext]) -> Self | None:
        known = copy.copy(self)
        known._recalled = coefficients
        known._fused = fused_gates(tensor for tensor in tensors if _is_block_matrix(tensor))
        return known

    def passes(self, unit: Unit) -> Sequence[Pass]:
        passes: list[Pass] = []
        if self._trims(unit.tensors[0]):
            passes += top_k_passes(self._trim_scores, [expert.density for expert in self.experts])
        if self.parameters.norm_tolerance != "off" and _is_block_matrix(unit.tensors[0]):
            passes.append(OutputNorm(self._merged, self.parameters.norm_tolerance))
        return passes

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        merged = self._merged(block, results)
        if "norm" in results:
            scale = results["norm"][block.tensor.name].scale
            merged = merged if scale == 1 else merged * scale
        return merged

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        entry: dict[str, Any] = {"coefficient": self._coefficients(tensor)}
        if tensor.name in self._fused:
            entry["gate_coefficient"] = [self.parameters.gate_factor * alpha for alpha in entry["coefficient"]]
        if "selection" in results and self.parameters.trim_scope == "tensor":
            entry["kept"] = [selection.kept for selection in results["selection"]]
        if "norm" in results:
            calibration = results["norm"][tensor.name]
            entry |= {"norm_ratio": calibration.ratio, "rescaled": calibration.scale != 1}
        return entry

    def block_table(self) -> list[dict[str, Any]]:
        return self._table

    def _trims(self, tensor: TensorContext) -> bool:
        return self.parameters.trim != "none" and _is_block_matrix(tensor)

    def _trim_scores(self, block: RowBlock) -> list[Tensor]:
        """Compared by magnitude."""
        trim = self.parameters.trim
        if trim == "magnitude":
            return block.task_vectors
        if trim == "quadratic":
            return [block.fisher * vector * vector for vector in block.task_vectors]
        return [block.fisher * vector for vector in block.task_vectors]

    def _coefficients(self, tensor: TensorContext) -> list[float]:
        if self._recalled is not None:
            return [*self._recalled[tensor.name]]
        other = self.parameters.other
        if tensor.block is None:
            if other == "mean":
                return [math.fsum(blocks.values()) / len(blocks) for blocks in self._by_block]
            factor = {"base": 0.0, "finetuned": 1.0}.get(other, other) if isinstance(other, str) else other
            return [float(factor)] * len(self.experts)
        gate = self.parameters.gate_factor if is_gate(tensor.name) else 1.0
        return [
            gate * by_tensor.get(tensor.name, by_block.get(tensor.block, max(by_block.values())))
            for by_tensor, by_block in zip(self._by_tensor, self._by_block, strict=True)
        ]

    def _factors(self, block: RowBlock) -> Sequence[float | Tensor]:
        """What the experts' task vectors are multiplied by: the coefficients; [r, 1] where only some rows are gates."""
        coefficients = self._coefficients(block.tensor)
        if block.tensor.name not in self._fused:
            return coefficients
        gates = gate_rows(block, self._fused[block.tensor.name])
        factor = self.parameters.gate_factor
        return [block.base.new_full(gates.shape, alpha).masked_fill_(gates, factor * alpha) for alpha in coefficients]

    def _merged(self, block: RowBlock, results: Results) -> Tensor:
        """Base plus scaled, trimmed task vectors, before the norm calibration."""
        vectors = block.task_vectors
        if "selection" in results:
            pairs = zip(vectors, self._trim_scores(block), results["selection"], strict=True)
            vectors = [vector * selection.mask(scores, block.offset) for vector, scores, selection in pairs]
        vectors = [vector * factor for vector, factor in zip(vectors, self._factors(block), strict=True)]
        if self._elects and len(vectors) > 1:  # of one task vector they change nothing
            return block.base + disjoint_merge(vectors, [1.0] * len(vectors))
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return block.base + total


class FimTa(FimTies):
    """Fisher-guided task arithmetic: the block coefficients of `fim_ties` on whole task vectors.

        theta = theta_0 + sum_i alpha_il (theta_i - theta_0)

    Convention: as `fim_ties`, without trim, gate factor and norm calibration unless asked for. Several task vectors
    are summed, as in task arithmetic: no sign is elected and nothing averaged.
    Reference: FIM-Merging, arXiv 2603.21705, "FIM-TA".

    Raises:
        CheckpointError: as `fim_ties`.
    """

    Parameters = FimTaParameters
    _elects = False
    summary = "Fisher block coefficients on whole task vectors"


class _TaskVectorSquares(Pass):
    name = "survey"

    def __init__(self, quadratic: bool) -> None:
        self.reads_fisher = quadratic

    def start(self, unit: Unit, done: Results) -> Any:
        return {"squares": [], "quadratic": []}

    def update(self, state: Any, block: RowBlock) -> None:
        squares = [vector.double().square() for vector in block.task_vectors]
        state["squares"].append([square.sum(1).sum().item() for square in squares])
        if self.reads_fisher:
            fisher = block.fisher.double()
            state["quadratic"].append([(square * fisher).sum(1).sum().item() for square in squares])

    def finish(self, state: Any) -> _Survey:
        return _Survey(
            [math.fsum(sums) for sums in zip(*state["squares"], strict=True)],
            [math.fsum(sums) for sums in zip(*state["quadratic"], strict=True)],
        )


def _is_block_matrix(tensor: TensorContext) -> bool:
    return tensor.block is not None and tensor.is_matrix


def _scores(
    surveys: Mapping[TensorContext, _Survey], fisher: FisherRecord | None, expert: int, parameters: FimParameters
) -> list[dict[str, Any]]:
    """One row per block (or matrix): Fisher and task vector means, pooled by element count, and their score."""
    groups: dict[tuple[int, str], list[TensorContext]] = {}
    for tensor in surveys:
        assert tensor.block is not None  # only matrices of blocks are surveyed
        groups.setdefault((tensor.block, tensor.name if parameters.granularity == "tensor" else ""), []).append(tensor)
    if not groups:
        raise CheckpointError("the models have no decoder blocks with matrices, so there is nothing to score")
    rows = []
    for (block, name), tensors in sorted(groups.items()):
        numel = sum(tensor.numel for tensor in tensors)
        row: dict[str, Any] = {"block": block}
        if name:
            row["tensor"] = name
        mean = None
        if fisher is not None:
            mean = math.fsum(fisher.tensors[tensor.name].mean * tensor.numel for tensor in tensors) / numel
        square = math.fsum(surveys[tensor].squares[expert] for tensor in tensors) / numel
        quadratic = math.fsum(q for tensor in tensors for q in surveys[tensor].quadratic[expert : expert + 1]) / numel
        row |= {"fisher_mean": mean, "task_vector_mean_square": square}
        row["score"] = score(parameters.importance, mean or 0.0, square, quadratic)
        rows.append(row)
    return rows
