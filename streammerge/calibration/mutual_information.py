"""How much a fine-tuned model's activations tell of the base's: mutual information, per block and sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streammerge.calibration.lockstep import Observer
from streammerge.fisher.blocks import BlockModel, first
from streammerge.fisher.head import logit_rows
from streammerge.fisher.phases import Phases
from streammerge.workers import Workers

_PIECE = 1 << 20  # counts looked at together


class MutualInformation(Observer):
    """Between the base (model 0) and every other model, for each sample:

        I(X; Y) = sum_xy p(x, y) log(p(x, y) / (p(x) p(y))),  in nats

    p the frequencies of values, rounded to bfloat16, over the elements of the activations of all tokens: the embedding,
    as the first block is given it; what the `down_proj` of each block gives (where a block has not just one, what the
    block gives); the final norm; and the logits of a head of its own.

    Attributes:
        found: per fine-tuned model: embedding, block number, norm or head -> I per sample.
    """

    def __init__(self, models: Sequence[BlockModel], workers: Workers, phases: Phases) -> None:
        self._models, self._workers, self._phases = models, workers, phases
        self.found: list[dict[str, list[float]]] = [{} for _ in models[1:]]
        self._base: dict[str, list[NDArray[np.uint16]]] = {}
        self._given: list[list[Tensor]] = []

    def embedded(self, model: int, hidden: Tensor) -> None:
        self._take("embedding", model, hidden)

    def before(self, model: int, block: int, module: nn.Module, start: int) -> Sequence[RemovableHandle]:
        named = [child for name, child in module.named_modules() if name.split(".")[-1] == "down_proj"]
        seen = named[0] if len(named) == 1 and isinstance(named[0], nn.Linear) else module

        def look(_: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._take(str(block), model, first(output))

        return [seen.register_forward_hook(look)]

    def walked(self, block: int) -> None:
        self._base.clear()

    def last(self, model: int, groups: list[Tensor]) -> None:
        given = [self._models[model].before_head(hidden) for hidden in groups]
        for hidden in given:
            self._take("norm", model, hidden)
        if self._models[0].head_tensor is not None:
            self._given.append(given)
            if len(self._given) == len(self._models):
                self._heads()

    def _heads(self) -> None:
        """The logits, a sample at a time: all models' together are the largest thing here."""
        samples = [torch.cat(given) for given in self._given]
        for of_models in zip(*samples, strict=True):
            base, *others = (self._logits(model, x) for model, x in zip(self._models, of_models, strict=True))
            for found, logits in zip(self.found, others, strict=True):
                found.setdefault("head", []).append(mutual_information(base, logits))

    def _logits(self, model: BlockModel, inputs: Tensor) -> NDArray[np.uint16]:
        vocabulary = model.vocab_size
        labels = np.empty((len(inputs), vocabulary), dtype=np.uint16)
        for start, logits in logit_rows(model, inputs, self._workers, self._phases):
            labels[:, start : start + logits.shape[1]] = as_labels(logits)
        return labels

    def _take(self, place: str, model: int, hidden: Tensor) -> None:
        """Activations [sequences, ...] of one group: the base's are kept until the others' have come."""
        kept = self._base.setdefault(place, [])
        if model == 0:
            kept.extend(as_labels(hidden))
            return
        found = self.found[model - 1].setdefault(place, [])
        for labels in as_labels(hidden):
            found.append(mutual_information(kept[len(found)], labels))


def as_labels(values: Tensor) -> NDArray[np.uint16]:
    """The bit patterns of the values in bfloat16, one for both zeros."""
    rounded = values.detach().to(torch.bfloat16) + 0.0
    return rounded.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def mutual_information(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> float:
    """I(a; b) in nats, of labels at the same places, from their frequencies; not below 0.

    As sklearn.metrics.mutual_info_score. With counts c of n pairs and S = sum c log c:

        I = log n - (S(a) + S(b) - S(a, b)) / n
    """
    a, b = a.reshape(-1), b.reshape(-1)
    if not len(a):
        return 0.0
    pairs = a.astype(np.uint32)
    pairs <<= 16
    pairs |= b
    pairs.sort()
    counts = [np.bincount(labels, minlength=1) for labels in (a, b)]
    single = math.fsum(_entropy_sum(of_one) for of_one in counts)
    return max(0.0, math.log(len(a)) - (single - _run_sum(pairs)) / len(a))


def _run_sum(ordered: NDArray[np.uint32]) -> float:
    """sum c log c over the lengths c of runs of equal values."""
    parts, begin = [], 0
    for start in range(0, len(ordered), _PIECE):
        stop = min(start + _PIECE, len(ordered))
        # a run ends before every index where the value changes, and at the end
        ends = np.flatnonzero(ordered[start + 1 : stop + 1] != ordered[start : min(stop, len(ordered) - 1)]) + start + 1
        if stop == len(ordered):
            ends = np.append(ends, stop)
        if len(ends):
            parts.append(_entropy_sum(np.diff(ends, prepend=begin)))
            begin = int(ends[-1])
    return math.fsum(parts)


def _entropy_sum(counts: NDArray[np.int64]) -> float:
    counts = counts[counts > 1]
    return float((counts * np.log(counts)).sum())
