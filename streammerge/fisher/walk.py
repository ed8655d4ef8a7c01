"""Forward and backward through the decoder blocks, one in memory at a time: record, then replay.

    F = (1/N) sum_i (d log p(x_i | theta) / d theta)^2,    log p(x_i | theta) = sum over next-token terms

Per-sequence gradients (one backward per sequence) are squared and accumulated in float32. Every block is
read twice, on the way forward and on the way back; between the two only its inputs are kept.
Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from functools import partial

import torch
from torch import Tensor, nn

from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel, Recording

Sink = Callable[[Mapping[str, Tensor]], None]
_PIECE = 1 << 20  # elements squared at a time, so that the float32 copies stay small


def walk(model: BlockModel, ids: Tensor, wanted: Set[str], sink: Sink, advance: Callable[[], object]) -> float:
    """Hand the diagonal Fisher of the wanted tensors to `sink`, block after block from the last to the first.

    Args:
        model: the model, nothing loaded.
        ids: token ids [samples, length].
        wanted: tensor names to measure.
        sink: receives {tensor name: float32 Fisher on the model's device}, once per block and, where anything
            outside the blocks is wanted, once more.
        advance: called after each block, forward and backward (2 * blocks times).

    Returns:
        The summed negative log-likelihood per sequence, mean over the sequences, in nats.

    Raises:
        CheckpointError: a non-finite value in a weight (named), or a loss or gradient (with block and sequence).
    """
    sequences = [row[None].to(model.device) for row in ids]
    model.load_resident()
    outside = _Squares(model, None, wanted)
    with torch.no_grad():
        recordings = [model.record(sequence) for sequence in sequences]
        inputs = _forward(model, recordings, advance)

    loss, gradients = _head(model, sequences, inputs.pop(), outside)
    for index in reversed(range(len(model.blocks))):
        block = model.load_block(index)
        squares = _Squares(model, index, wanted)
        for sequence, hidden in enumerate(inputs.pop()):
            args, kwargs = recordings[sequence].calls[index]
            hidden = hidden.to(model.device).requires_grad_()
            _first(block(hidden, *args, **kwargs)).backward(gradients[sequence])
            gradients[sequence] = _gradient(hidden)
            _require_finite(gradients[sequence], model, f"the gradient at decoder block {index}", sequence)
        model.unload_block(index)
        sink(squares.means(len(sequences)))
        advance()

    if outside.squares:
        _before_blocks(model, sequences, gradients, outside)
        sink(outside.means(len(sequences)))
    return loss


def _forward(model: BlockModel, recordings: list[Recording], advance: Callable[[], object]) -> list[list[Tensor]]:
    """The input of every block and the output of the last one: [block][sequence], on the CPU."""
    inputs = [[recording.embedded.cpu() for recording in recordings]]
    for index in range(len(model.blocks)):
        block = model.load_block(index)
        outputs = []
        for sequence, recording in enumerate(recordings):
            args, kwargs = recording.calls[index]
            hidden = _first(block(inputs[-1][sequence].to(model.device), *args, **kwargs))
            _require_finite(hidden, model, f"the output of decoder block {index}", sequence)
            outputs.append(hidden.cpu())
        inputs.append(outputs)
        model.unload_block(index)
        advance()
    return inputs


def _head(
    model: BlockModel, sequences: list[Tensor], hiddens: list[Tensor], outside: _Squares
) -> tuple[float, list[Tensor]]:
    """The mean loss, and the gradient of each sequence at the output of the last block."""
    losses, gradients = [], []
    for sequence, (ids, hidden) in enumerate(zip(sequences, hiddens, strict=True)):
        hidden = hidden.to(model.device).requires_grad_()
        outside.begin(sequence, ids)
        logits = model.logits(ids, hidden)[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        _require_finite(loss, model, "the loss", sequence)
        loss.backward()
        gradients.append(_gradient(hidden))
        losses.append(loss.item())
    return sum(losses) / len(losses), gradients


def _before_blocks(model: BlockModel, sequences: list[Tensor], gradients: list[Tensor], outside: _Squares) -> None:
    """Carry the gradients at the first block's input on into the embedding."""
    outside.at_input = True
    for sequence, (ids, gradient) in enumerate(zip(sequences, gradients, strict=True)):
        outside.begin(sequence, ids)
        embedded = model.record(ids).embedded
        if embedded.requires_grad:
            embedded.backward(gradient)


class _Squares:
    """Gradient hooks that square each gradient into a float32 accumulator and free it at once.

    The gradient of a tied embedding comes in two parts, from the head and from the input; the square is of
    their sum. They overlap only in the rows of the sequence's own ids, so the head's part of those rows waits.

    Args:
        model: the model.
        index: the loaded block, or None for what lies outside the blocks.
        wanted: tensor names to hook; the others get no gradient.
    """

    def __init__(self, model: BlockModel, index: int | None, wanted: Set[str]) -> None:
        self.squares: dict[str, Tensor] = {}
        self.at_input = False
        self._from_head: dict[int, Tensor] = {}
        embedding = model.input_embedding()
        for name, parameter in model.parameters(index):
            if name in wanted:
                parameter.requires_grad_()
                self.squares[name] = torch.zeros_like(parameter, dtype=torch.float32)
                hook = self._embedding_hook if parameter is embedding else _square_into
                parameter.register_post_accumulate_grad_hook(partial(hook, self.squares[name]))

    def begin(self, sequence: int, ids: Tensor) -> None:
        self._sequence, self._rows = sequence, ids.unique()

    def means(self, samples: int) -> dict[str, Tensor]:
        return {name: square.div_(samples) for name, square in self.squares.items()}

    def _embedding_hook(self, square: Tensor, parameter: Tensor) -> None:
        gradient = _gradient(parameter)
        rows = gradient[self._rows].float()
        if self.at_input:
            parameter.grad = None
            if self._sequence in self._from_head:
                rows += self._from_head.pop(self._sequence)
            square.index_add_(0, self._rows, rows.square_())
        else:
            self._from_head[self._sequence] = rows
            gradient[self._rows] = 0
            _square_into(square, parameter)


def _square_into(square: Tensor, parameter: Tensor) -> None:
    """square += gradient^2, in float32, piece by piece; the gradient is freed."""
    gradient = _gradient(parameter)
    parameter.grad = None
    for total, piece in zip(square.view(-1).split(_PIECE), gradient.reshape(-1).split(_PIECE), strict=True):
        piece = piece.float()
        total.addcmul_(piece, piece)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("backward left no gradient")  # a bug of ours: a detached input or parameter
    return tensor.grad


def _require_finite(values: Tensor, model: BlockModel, what: str, sequence: int) -> None:
    if not values.isfinite().all():
        raise CheckpointError(
            f"model {model.base.id}: {what} is not finite in sequence {sequence} (computed in {model.dtype}); "
            "try --fisher-compute-dtype float32"
        )
