"""What a walk makes of the gradients it comes by: their squares, for the Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from typing import ClassVar

import torch
from torch import Tensor, nn

from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.head import HeadWalk, InputGradients
from streammerge.fisher.linear import Factors
from streammerge.fisher.names import Part
from streammerge.fisher.squares import GradientHooks, GradientSquares, Sink, emit, wanted_parts
from streammerge.workers import Workers

_ZEROS = 1 << 20  # elements


class Reduction(ABC):
    """What becomes of the gradients of the tensors that are wanted.

    One that wants nothing outside the decoder blocks needs neither `head` nor `embedding`.

    Attributes:
        wanted: names of tensors.
        dtype_option: the option that sets the dtype of the walk, for messages.
    """

    wanted: Set[str]
    dtype_option: ClassVar[str]

    @abstractmethod
    def left(self, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        """Of some parameters, the parts whose tensors are wanted and not finished yet."""

    @abstractmethod
    def hooks(self, parameters: Mapping[str, nn.Parameter], sequences: int) -> GradientHooks:
        """Hook parameters, for what gradients they get besides the factors of linear functions."""

    @abstractmethod
    def take(self, factors: dict[str, list[Factors]]) -> None:
        """A group of sequences went back through a block. What needs no other group may be taken out of `factors`."""

    @abstractmethod
    def finish(
        self, parameters: Iterable[str], factors: Mapping[str, list[Factors]], sums: Mapping[str, Tensor]
    ) -> None:
        """Finish some parameters, which are still in memory, and make that durable.

        Args:
            parameters: names; what is not wanted, or finished, is passed over.
            factors: of those used in linear functions.
            sums: what the hooks left, of the others.
        """

    def head(self, walk: HeadWalk, normaliser: Tensor, names: set[str], tied: InputGradients | None) -> None:
        """Finish tensors of a head that is walked in rows; `tied`: what its rows get as embeddings besides."""
        raise NotImplementedError

    def embedding(self, inputs: InputGradients) -> None:
        """Finish an embedding of its own: no row has a gradient but those of the tokens."""
        raise NotImplementedError


class FisherSquares(Reduction):
    """The mean of squares, handed to a sink.

    Args:
        model: the model walked.
        wanted: names of the tensors to measure.
        sink: takes the Fisher, block after block from the last to the first, then what lies outside them.
        samples: how many sequences there are.
        workers: share the work on the CPU.
    """

    dtype_option = "--fisher-compute-dtype"

    def __init__(self, model: BlockModel, wanted: Set[str], sink: Sink, samples: int, workers: Workers) -> None:
        self.wanted = wanted
        self._model, self._sink, self._samples, self._workers = model, sink, samples, workers

    def left(self, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        return wanted_parts(self._model.parts, parameters, self.wanted, self._sink)

    def hooks(self, parameters: Mapping[str, nn.Parameter], sequences: int) -> GradientSquares:
        return GradientSquares(parameters, sequences, self._model.base.id)

    def take(self, factors: dict[str, list[Factors]]) -> None:
        """Nothing: all groups' squares are summed tile by tile, at the end of the block."""

    def finish(
        self, parameters: Iterable[str], factors: Mapping[str, list[Factors]], sums: Mapping[str, Tensor]
    ) -> None:
        names, parts, sink = list(parameters), self._model.parts, self._sink
        finished = [part.tensor for name in names for part in parts[name] if sink.has(part.tensor.name)]
        emit(self.left(names), factors, sums, self._samples, sink, self._workers, self._model.base.id, finished)
        sink.sync()

    def head(self, walk: HeadWalk, normaliser: Tensor, names: set[str], tied: InputGradients | None) -> None:
        walk.squares(normaliser, self._sink, names, tied)
        for name in names:
            self._sink.done(name)

    def embedding(self, inputs: InputGradients) -> None:
        info = self._model.parts[self._model.embedding][0].tensor
        rows, columns = info.shape
        squares = inputs.gradients.square().mean(0)
        step = max(1, _ZEROS // columns)
        for start in range(0, rows, step):
            block = torch.zeros(min(step, rows - start), columns, dtype=squares.dtype, device=squares.device)
            here = ((inputs.tokens >= start) & (inputs.tokens < start + len(block))).nonzero().flatten()
            block[inputs.tokens[here] - start] = squares[here]
            self._sink.write(info.name, start * columns, block)
        self._sink.done(info.name)
