"""Whether a merged model's activations and weights have collapsed, block by block, beside its sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streammerge.calibration.lockstep import Observer
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import torch_dtype
from streammerge.checkpoints.header import TensorInfo
from streammerge.diagnose.numbers import activation_variance, effective_rank, mean
from streammerge.diagnose.settings import RankOf
from streammerge.fisher.blocks import BlockModel
from streammerge.methods.gram import Gram
from streammerge.workers import Workers

_PIECE = 1 << 18  # elements of each model's tensor that are compared at a time


class Collapse(Observer):
    """Measures every block once all models have been through it.

    Args:
        models: the merged model and its sources, as they walk.
        rank: which values the effective rank is of.
        workers: a model's activations, or a piece of the weights, at a time.

    Attributes:
        rows: one mapping per block, as `diagnose` returns them.
    """

    def __init__(self, models: Sequence[BlockModel], rank: RankOf, workers: Workers) -> None:
        self._models, self._rank, self._workers = models, rank, workers
        self._outputs: list[list[Tensor]] = [[] for _ in models]
        self.rows: list[dict[str, Any]] = []

    def output(self, model: int, block: int, hidden: Tensor) -> None:
        self._outputs[model].append(hidden)  # which the walk keeps anyhow, as the next block's input

    def walked(self, block: int) -> None:
        count = len(self._models)
        variances, ranks = [0.0] * count, [0.0] * count

        def measure(model: int) -> None:
            hidden = torch.cat([h.reshape(-1, h.shape[-1]).cpu() for h in self._outputs[model]]).double()
            variances[model], ranks[model] = activation_variance(hidden), effective_rank(hidden, self._rank)

        self._workers.run(measure, range(count))
        for outputs in self._outputs:
            outputs.clear()
        # Read again in pieces, for the walk keeps no block; the system still has the files' pages at hand.
        weights = compare_weights(self._models, block, self._workers)
        self.rows.append(
            {
                "block": block,
                "activation_variance": variances[0],
                "source_variances": variances[1:],
                "variance_ratio": _to_mean(variances),
                "effective_rank": ranks[0],
                "source_ranks": ranks[1:],
                "rank_ratio": _to_mean(ranks),
                "norm": weights.norms[0],
                "source_norms": weights.norms[1:],
                "norm_shrinkage": _to_mean(weights.norms),
                "source_angles": weights.angles,
                "mean_squared_angle": mean([angle * angle for angle in weights.angles]),
            }
        )


@dataclass(frozen=True)
class BlockWeights:
    """One block of the merged model beside the same block of its sources, all its tensors taken as one vector.

    Attributes:
        norms: Euclidean norms, the merged model's first.
        angles: between the merged block and each source's, in rad; a right angle where one of the two is zero.
    """

    norms: list[float]
    angles: list[float]


def compare_weights(models: Sequence[BlockModel], block: int, workers: Workers) -> BlockWeights:
    """Norms and angles of one block, read in pieces from the files; summed in float64.

        |u - v|^2 = (|x - y|^2 - (|x| - |y|)^2) / (|x| |y|),   u = x / |x|, v = y / |y|;   angle = 2 asin(|u - v| / 2)

    An angle from the cosine would have no digits below 1e-8. The sums do not depend on the number of threads.
    """
    pieces = list(_pieces(models, block))
    sums: list[list[float]] = [[] for _ in pieces]

    def measure(number: int) -> None:
        infos, start, count = pieces[number]
        merged, *sources = (_read(m, info, start, count) for m, info in zip(models, infos, strict=True))
        squares = [values.square().sum() for values in (merged, *sources)]
        apart = [(source - merged).square().sum() for source in sources]
        sums[number] = [float(total) for total in (*squares, *apart)]

    workers.run(measure, range(len(pieces)))
    totals = [math.fsum(column) for column in zip(*sums, strict=True)]
    squares, apart = totals[: len(models)], totals[len(models) :]
    gram = Gram(tuple(squares), ((0.0, *apart),))  # only distances from the merged model are measured
    angles = [2 * math.asin(math.sqrt(gram.chord2(0, source)) / 2) for source in range(1, len(models))]
    return BlockWeights(gram.norms, angles)


def _pieces(models: Sequence[BlockModel], block: int) -> Iterator[tuple[list[TensorInfo], int, int]]:
    """The same elements of every model: the tensor in each, the first element, how many."""
    parts = [[part.tensor for slot in model.layouts[block].slots for part in slot.parts] for model in models]
    for infos in zip(*parts, strict=True):
        for start in range(0, infos[0].numel, _PIECE):
            yield list(infos), start, min(_PIECE, infos[0].numel - start)


def _read(model: BlockModel, info: TensorInfo, start: int, count: int) -> Tensor:
    raw = torch.empty(count, dtype=torch_dtype(info.dtype))
    model.base.read_into(info, start * raw.itemsize, as_bytes(raw))
    return raw.double()


def _to_mean(values: Sequence[float]) -> float | None:
    """The merged model's value over the mean of its sources'; None where that is zero."""
    sources = math.fsum(values[1:]) / (len(values) - 1)
    return values[0] / sources if sources else None
