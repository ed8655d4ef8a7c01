"""How sensitive models are: |weight * gradient| per decoder block, and how far apart their logits are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streammerge.calibration.lockstep import Lockstep, Observer
from streammerge.calibration.store import CalibrationSettings, Sensitivity
from streammerge.checkpoints import disk
from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.head import logit_rows, rows_at_a_time
from streammerge.fisher.linear import Factors
from streammerge.fisher.measure import block_matrices
from streammerge.fisher.names import Part
from streammerge.fisher.phases import Phases
from streammerge.fisher.reduction import Reduction
from streammerge.fisher.squares import GradientHooks
from streammerge.fisher.state import WalkState
from streammerge.fisher.walk import Walk
from streammerge.heap import give_back
from streammerge.workers import Workers

_PIECE = 1 << 20  # elements of a gradient looked at together
_TOKENS = 64  # whose logits are compared together

Advance = Callable[[int], object]


def measure_sensitivity(
    models: Sequence[BlockModel],
    texts: Sequence[Tensor],
    settings: CalibrationSettings,
    folder: Path,
    workers: Workers,
    advance: Advance,
    phases: Phases,
) -> Sensitivity:
    """Each model forward and back on its own text, then all of them in step, forward, on every text.

    Args:
        models: the base and the fine-tuned ones, nothing loaded.
        texts: token ids [samples, length] of every text.
        settings: say which text is whose.
        folder: for what is kept between the blocks; it is gone afterwards.
        workers: share the work on the CPU.
        advance: called with the steps done, in all as many as `sensitivity_steps` says.
        phases: takes the time.

    Raises:
        CheckpointError: a non-finite weight, activation or gradient, or a head that cannot be walked in rows.
    """
    count = len(models)
    blocks = []
    for number, model in enumerate(models):
        ids = texts[settings.text_of(number)]
        blocks.append(block_sensitivities(model, ids, folder, workers, advance, phases))
        advance(0)  # memory goes back to the system
    distances = [[0.0] * count for _ in models]
    for text, ids in enumerate(texts):
        owners = [number for number in range(count) if settings.text_of(number) == text]
        observer = LogitDistances(models, owners, workers, phases)
        Lockstep(models, ids, [observer], workers, advance, phases).run()
        for (one, other), distance in observer.found.items():
            distances[one][other] = distance
    return Sensitivity(blocks=blocks, distances=distances)


def sensitivity_steps(models: Sequence[BlockModel], texts: int) -> int:
    """Blocks and heads that are gone through; of the walks in step, as everywhere, the blocks alone."""
    blocks = [len(model.blocks) for model in models]
    return sum(2 * count + 1 for count in blocks) + texts * sum(blocks)


def block_sensitivities(
    model: BlockModel, ids: Tensor, folder: Path, workers: Workers, advance: Advance, phases: Phases
) -> dict[int, float]:
    """Of every decoder block, the mean over the samples of the sum of |w dL/dw| over the weights of its matrices.

    L is the summed negative log-likelihood of a sample's next tokens, in nats. Of a mixture, the experts that were
    reached count.
    """
    disk.remove_tree(folder)  # of an interrupted call, whose sums are lost
    reduction = WeightedGradients(model, workers)
    Walk(model, ids, reduction, WalkState(folder), workers, (), advance, phases).run()
    disk.remove_tree(folder)
    found = {
        block: math.fsum(reduction.found.get(name, 0.0) for name in model.parameters(block)) / len(ids)
        for block in range(len(model.blocks))
    }
    for block, value in found.items():
        if not math.isfinite(value):
            raise CheckpointError(
                f"model {model.base.id}: the gradients of decoder block {block} are not finite; try "
                f"{reduction.dtype_option} float32"
            )
    return found


class WeightedGradients(Reduction):
    """The sum over the sequences of |w dL/dw|, summed over a parameter; of the decoder blocks' matrices.

    Attributes:
        found: parameter name -> the sum.
    """

    dtype_option = "--calibration-compute-dtype"

    def __init__(self, model: BlockModel, workers: Workers) -> None:
        self.wanted = frozenset(block_matrices(model.base))
        self.found: dict[str, float] = {}
        self._parts: dict[str, list[float]] = {}
        self._model, self._workers = model, workers

    def left(self, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        parts = {name: self._model.parts[name] for name in parameters if name not in self.found}
        return {name: of for name, of in parts.items() if any(part.tensor.name in self.wanted for part in of)}

    def hooks(self, parameters: Mapping[str, nn.Parameter], sequences: int) -> GradientHooks:
        return _WeightedSums(parameters, sequences, self._model.base.id)

    def take(self, factors: dict[str, list[Factors]]) -> None:
        for name, of_parameter in factors.items():
            weight = self._model.model.get_parameter(name).detach().view(-1)
            self._parts.setdefault(name, []).extend(self._sum(factor, weight) for factor in of_parameter)
        factors.clear()
        give_back()  # what the group left; the next one needs as much in other pieces

    def finish(
        self, parameters: Iterable[str], factors: Mapping[str, list[Factors]], sums: Mapping[str, Tensor]
    ) -> None:
        for name in self.left(parameters):
            taken = self._parts.pop(name, [])
            if taken and name in sums:
                raise CheckpointError(
                    f"model {self._model.base.id}: parameter {name!r} is used in a linear function and in another way, "
                    "so its gradients cannot be told apart"
                )
            self.found[name] = math.fsum([sums[name].item()] if name in sums else taken)

    def _sum(self, factor: Factors, parameter: Tensor) -> float:
        """Over the rows of one linear function."""
        wide, step = factor.widened(), factor.tile[0]
        end = factor.start + factor.rows * factor.columns
        weight = parameter[factor.start : end].view(factor.rows, factor.columns)
        sums: list[float] = []

        def some_rows(first: int) -> None:
            rows = range(first, min(first + step, factor.rows))
            sums.append(wide.magnitude(rows, weight[rows.start : rows.stop], self._workers))

        self._workers.run(some_rows, range(0, factor.rows, step))
        return math.fsum(sums)


class _WeightedSums(GradientHooks):
    """Sums of |w dL/dw| over a parameter, float64."""

    def add(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=gradient.device))
        pairs = zip(parameter.detach().view(-1).split(_PIECE), gradient.reshape(-1).split(_PIECE), strict=True)
        for weights, piece in pairs:
            total += piece.to(wide).mul(weights.to(wide)).abs_().sum(dtype=torch.float64)


class LogitDistances(Observer):
    """The mean over all tokens of |logits_i - logits_j|, the Euclidean norm over the vocabulary.

    The models' heads are walked in step, some rows of all of them at a time, from float32 or wider; nothing is kept
    but a float64 sum of squares per token.

    Args:
        models: the models walked.
        owners: those among them whose text it is: j.
        workers: share the work on the CPU.
        phases: takes the time.

    Attributes:
        found: (i, j) -> the mean, for every other model i.
    """

    def __init__(self, models: Sequence[BlockModel], owners: Collection[int], workers: Workers, phases: Phases) -> None:
        self._models, self._workers, self._phases = models, workers, phases
        self._pairs = {tuple(sorted((i, j))) for j in owners for i in range(len(models)) if i != j}
        self._owners = frozenset(owners)
        self._given: list[Tensor] = []
        self.found: dict[tuple[int, int], float] = {}

    def last(self, model: int, groups: list[Tensor]) -> None:
        given = torch.cat([self._models[model].before_head(hidden).flatten(0, 1) for hidden in groups])
        self._given.append(given.to(torch.promote_types(given.dtype, torch.float32)))
        if len(self._given) == len(self._models):
            self._compare()

    def _compare(self) -> None:
        tokens = len(self._given[0])
        sums = {pair: self._given[0].new_zeros(tokens, dtype=torch.float64) for pair in sorted(self._pairs)}
        step = min((rows_at_a_time(model, tokens) for model in self._models if model.head is not None), default=None)
        heads = [
            logit_rows(model, inputs, self._workers, self._phases, step)
            for model, inputs in zip(self._models, self._given, strict=True)
        ]
        for rows in zip(*heads, strict=True):
            add = partial(_add_squares, sums, [logits for _, logits in rows])
            self._workers.run(add, range(0, tokens, _TOKENS))
        for (one, other), total in sums.items():
            distance = total.sqrt().mean().item()
            if not math.isfinite(distance):
                raise CheckpointError(
                    f"models {self._models[one].base.id} and {self._models[other].base.id}: their logits are not "
                    "finite; try --calibration-compute-dtype float32"
                )
            for i, j in ((one, other), (other, one)):
                if j in self._owners:
                    self.found[i, j] = distance


def _add_squares(sums: Mapping[tuple[int, ...], Tensor], logits: Sequence[Tensor], first: int) -> None:
    """Add what some ids' logits of some tokens, from the first on, make of the squared distances."""
    part = slice(first, first + _TOKENS)
    for (one, other), total in sums.items():
        total[part] += (logits[one][part] - logits[other][part]).double().square_().sum(1)
