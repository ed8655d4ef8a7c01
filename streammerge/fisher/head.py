"""The loss and its gradient, with the head walked in blocks of vocabulary rows.

    loss_i = sum_t (log sum_v exp(l_tv) - l_t,target),    l = f(x W^T + b)

f is what the model makes of its head's output element by element (a scale, a soft cap). The log-sum-exp and the
gradient at x are accumulated row block by row block, rescaled whenever a larger logit turns up (as in flash
attention), so that neither the whole head nor all logits are ever in memory, and the head is read once. With the
head's own Fisher wanted it is read a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import require_finite, torch_dtype
from streammerge.checkpoints.checksum import add, part_sum
from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.linear import product, product_back
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import HEAD_TOKENS, SQUARES, head_rows
from streammerge.fisher.squares import Sink
from streammerge.workers import Workers


@dataclass
class Scores:
    """What the walk over the head gives.

    Attributes:
        losses: summed negative log-likelihood of each sequence, float64, in nats.
        gradient: at the head's input x, [sequences, tokens, hidden], float32 or wider.
        normaliser: log sum exp of every token's logits, [sequences, tokens].
    """

    losses: Tensor
    gradient: Tensor
    normaliser: Tensor


@dataclass
class InputGradients:
    """Gradients that rows of a tied head get as token embeddings; the square is of the sum of both.

    Attributes:
        tokens: the sorted ids of all sequences.
        gradients: [sequences, tokens, columns], zero for a token that is not in a sequence.
    """

    tokens: Tensor
    gradients: Tensor

    def add_to(self, start: int, gradients: Tensor) -> None:
        """Add to gradients [sequences, rows, columns] of the rows from `start` on."""
        here = ((self.tokens >= start) & (self.tokens < start + gradients.shape[1])).nonzero().flatten()
        gradients[:, self.tokens[here] - start] += self.gradients[:, here]


class HeadWalk:
    """The head of a model over inputs x [sequences, tokens, hidden] and next tokens [sequences, tokens]."""

    def __init__(self, model: BlockModel, inputs: Tensor, targets: Tensor, phases: Phases, workers: Workers) -> None:
        self.model, self.phases, self.workers = model, phases, workers
        self.inputs, self.targets = inputs.detach(), targets
        self._x, self._target = self.inputs.flatten(0, 1), targets.flatten()

    def scores(self) -> Scores:
        """Losses, gradient at x, normaliser; one pass over the head for every `HEAD_TOKENS` tokens."""
        groups = zip(self._x.split(HEAD_TOKENS), self._target.split(HEAD_TOKENS), strict=True)
        found = [self._group(x, target) for x, target in groups]
        normaliser, right, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
        shape = self.targets.shape
        return Scores(
            losses=(normaliser - right).view(shape).double().sum(1),
            gradient=gradient.view(self.inputs.shape),
            normaliser=normaliser.view(shape),
        )

    def _group(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some tokens: normaliser [tokens, 1], logit of the right token [tokens, 1], gradient at x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        most = torch.full((len(x), 1), -torch.inf, dtype=wide, device=x.device)
        total, right = torch.zeros_like(most), torch.zeros_like(most)
        pulled = torch.zeros(x.shape, dtype=wide, device=x.device)  # sum of exp(l - most) f' W
        pushed = torch.zeros_like(pulled)  # f' W of the right token
        for start, weight, bias in weight_rows(self.model, len(x), self.phases):
            raw, logits = self._logits(x, weight, bias)
            values = logits.detach()
            larger = torch.maximum(most, values.max(1, keepdim=True).values)
            shrink = (most - larger).exp_()
            odds = (values - larger).exp_()
            (slope,) = torch.autograd.grad(logits, raw, odds, retain_graph=True)
            total.mul_(shrink).add_(odds.sum(1, keepdim=True))
            pulled.mul_(shrink).add_(product_back(slope, weight, self.workers))
            most = larger
            here = ((target >= start) & (target < start + len(weight))).nonzero().flatten()
            column = target[here] - start
            chosen = torch.zeros_like(values)
            chosen[here, column] = 1
            (slope,) = torch.autograd.grad(logits, raw, chosen)
            right[here, 0] = values[here, column]
            pushed[here] = slope[here, column, None].to(wide) * weight[column].to(wide)
        return most + total.log(), right, pulled.div_(total).sub_(pushed)

    def squares(self, normaliser: Tensor, sink: Sink, wanted: set[str], tied: InputGradients | None) -> None:
        """A second pass over the head, for its own Fisher: hand that of the wanted weight and bias to the sink."""
        model, count = self.model, len(self.inputs)
        assert model.head is not None
        weight_name = model.parts[model.head][0].tensor.name
        biases = [model.parts[name][0].tensor.name for name, leaf in model.names_of_head.items() if leaf == "bias"]
        x = self.inputs.to(normaliser.dtype)
        columns = x.shape[-1]
        for start, weight, bias in weight_rows(model, len(self._x), self.phases):
            raw, logits = self._logits(self._x, weight, bias)
            excess = (logits.detach() - normaliser.view(-1, 1)).exp_()
            here = ((self._target >= start) & (self._target < start + len(weight))).nonzero().flatten()
            excess[here, self._target[here] - start] -= 1
            (slope,) = torch.autograd.grad(logits, raw, excess)
            slope = slope.to(x.dtype).view(count, -1, len(weight))
            for name in wanted.intersection(biases):
                sink.write(name, start, slope.sum(1).square_().mean(0))
            step = max(1, SQUARES // (count * columns))
            for row in range(0, len(weight) if weight_name in wanted else 0, step):
                gradients = torch.bmm(slope[:, :, row : row + step].transpose(1, 2), x)
                if tied is not None:
                    tied.add_to(start + row, gradients)
                sink.write(weight_name, (start + row) * columns, gradients.square_().mean(0))

    def is_elementwise(self) -> bool:
        """Whether the model treats each logit by itself, so that the vocabulary can be cut. Reads nothing."""
        return is_elementwise(self.model, self._x)

    def _logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head's own output for some rows, and the logits the model makes of it, with the graph between."""
        raw = product(x, weight, bias, self.workers).requires_grad_()
        with torch.enable_grad():
            logits = self.model.after_head(raw)
            return raw, logits.to(torch.promote_types(logits.dtype, torch.float32))


def is_elementwise(model: BlockModel, numbers: Tensor) -> bool:
    """Whether a model treats each logit by itself, tried out on any numbers [tokens, some] in place of logits."""
    half = numbers.shape[1] // 2
    try:
        with torch.no_grad():
            whole, *parts = (model.after_head(some) for some in (numbers, numbers[:, :half], numbers[:, half:]))
    except (IndexError, RuntimeError):  # it expects the whole vocabulary
        return False
    return whole.shape == numbers.shape and torch.equal(whole, torch.cat(parts, 1))


def logit_rows(
    model: BlockModel, inputs: Tensor, workers: Workers, phases: Phases, step: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first token id, logits [tokens, some ids]) of what a head is given, [tokens, hidden]; the head is read once.

    Args:
        model, phases: see `weight_rows`.
        inputs: what the head is given; the logits have its dtype.
        workers: share the products on the CPU.
        step: how many ids at a time; None: see `rows_at_a_time`.

    Raises:
        CheckpointError: the head cannot be cut by rows.
    """
    if model.head is None or not is_elementwise(model, inputs):
        raise CheckpointError(
            f"model {model.base.id}: the head of {type(model.model).__name__} does more than score each token by "
            "itself, so its logits cannot be walked in pieces; choose a method that does not look at them"
        )
    for start, weight, bias in weight_rows(model, len(inputs), phases, step):
        yield start, model.after_head(product(inputs, weight, bias, workers))


def rows_at_a_time(model: BlockModel, tokens: int) -> int:
    """How many rows of a head that many tokens go through together: both share a fixed amount of memory."""
    assert model.head is not None
    info = model.parts[model.head][0].tensor
    return head_rows(info.nbytes // info.shape[0], tokens)


def weight_rows(
    model: BlockModel, tokens: int, phases: Phases, step: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first row, weights [some rows, hidden] as stored, bias) down a head, the next rows read meanwhile.

    Args:
        model: its head must be a plain linear layer.
        tokens: how many tokens go through it together.
        phases: takes the time of reading.
        step: rows at a time; None: see `rows_at_a_time`.
    """
    assert model.head is not None
    info = model.parts[model.head][0].tensor
    bias = model.model.get_output_embeddings().bias
    rows, columns = info.shape
    width = info.nbytes // rows
    step = step or rows_at_a_time(model, tokens)

    checksum = 0

    def read(start: int, buffer: Tensor) -> Tensor:
        nonlocal checksum
        raw = buffer[: min(step, rows - start) * width]
        with phases.time("read"):
            model.base.read_into(info, start * width, as_bytes(raw))
        phases.read(len(raw))
        checksum = add(checksum, part_sum(as_bytes(raw), start * width))
        if start + step >= rows:
            model.base.confirm(info, checksum)
        values = raw.view(torch_dtype(info.dtype)).view(-1, columns)
        require_finite(values, info, model.base.id, "repair it: it cannot be walked")
        return values

    buffers = [torch.empty(step * width, dtype=torch.uint8) for _ in range(2)]
    with ThreadPoolExecutor(1, "streammerge-read") as reader:
        following = reader.submit(read, 0, buffers[0])
        for number, start in enumerate(range(0, rows, step)):
            values = following.result()
            if start + step < rows:
                following = reader.submit(read, start + step, buffers[(number + 1) % 2])
            part = None if bias is None else bias[start : start + step]
            yield start, values.to(model.device), part
