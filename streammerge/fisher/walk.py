"""Forward and backward through the decoder blocks, one in work at a time: record, then replay.

    g_i = d log p(x_i | theta) / d theta,    log p(x_i | theta) = sum over next-token terms

of every sequence i; `reduction.py` says what is made of them, for the Fisher F = (1/N) sum_i g_i^2. Sequences go
through a block in groups that keep their gradients apart (see `linear.py`). Every block is read twice, on the way
forward and on the way back, or once where it stays on the device; between the two only its inputs are kept, on disk,
so that an interrupted walk goes on at the same block.
Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel, Recording, first
from streammerge.fisher.feed import BlockFeed
from streammerge.fisher.head import HeadWalk, InputGradients
from streammerge.fisher.linear import LinearFunctions, MixedSequencesError
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import GROUP_TOKENS
from streammerge.fisher.recall import Recall
from streammerge.fisher.reduction import Reduction
from streammerge.fisher.squares import GradientHooks
from streammerge.fisher.state import WalkState
from streammerge.workers import Workers


@dataclass
class Walk:
    """One pass.

    Args:
        model: the model, nothing loaded.
        ids: token ids [samples, length].
        reduction: takes the gradients, block after block from the last to the first, then what lies outside them.
        state: what an earlier walk over the same ids left, and what this one will.
        workers: share the work on the CPU.
        stay: blocks that stay on the device between forward and backward.
        advance: called once per step: every block forward, the head, every block backward.
        phases: takes the time.

    Attributes:
        losses: after `run`: summed negative log-likelihood of each sequence, in nats.
        notes: what a user should know.
    """

    model: BlockModel
    ids: Tensor
    reduction: Reduction
    state: WalkState
    workers: Workers
    stay: Collection[int] = ()
    advance: Callable[[int], object] = lambda steps: None
    phases: Phases = field(default_factory=Phases)

    def __post_init__(self) -> None:
        self.losses: Tensor = torch.empty(0)
        self.notes: list[str] = []
        self._recall: Recall | None = None
        self._tokens, local = self.ids.unique(return_inverse=True)  # sorted, and each id's place among them
        self._local = local.to(self.model.device)

    def run(self) -> None:
        """Walk from where the state is to the end.

        Raises:
            CheckpointError: a non-finite value in a weight (named), or a loss or gradient (with block and sequence).
        """
        self._load_outside()
        apart = self.model.all_linear(set(self.reduction.wanted)) and not self._outside_wanted()
        size = max(1, GROUP_TOKENS // self.ids.shape[1]) if apart and not self.state.indices("alone") else 1
        try:
            self._walk(size)
        except MixedSequencesError:  # a block mixes its sequences up: one at a time, then, also when interrupted
            self.state.clear()
            self.state.save("alone", 0, {})
            self._walk(1)

    def _walk(self, size: int) -> None:
        model, last = self.model, len(self.model.blocks)
        groups = self._local.split(size)
        with self.phases.time("forward"):
            recordings = [model.record(group) for group in groups]
        special = {model.embedding, *model.names_of_head}
        outside = {n: p for n, p in model.parameters(None).items() if n in self._outside_wanted() and n not in special}
        hooks = self.reduction.hooks(outside, size)
        walked = self.state.indices("gradient")
        if not walked and not self.state.indices("input"):
            self.state.save("input", 0, {"hidden": torch.cat([r.embedded.detach() for r in recordings])})
        begin = last if walked else self.state.indices("input")[-1]
        end = walked[0] if walked else last
        self.advance(begin + (1 + last - end if walked else 0))
        order = [*range(begin, last), *reversed(range(end))]
        with (
            BlockFeed(model.feed_blocks, order, model.device, self.stay, self.phases) as feed,
            Recall(self.state.folder) as recall,
        ):
            self._recall = recall if model.device.type == "cpu" else None  # a GPU computes faster than a disk reads
            for index in range(begin, last):
                self._forward(feed, index, recordings, size)
            if not walked:
                self._head(recordings, size, hooks)
            for index in reversed(range(end)):
                self._backward(feed, index, recordings, size)
        left = self.state.load("gradient", 0)
        self.losses = left["losses"]
        if left["resident"]:
            self.notes.append("the head does more than score each token by itself, so all of it is in memory")
        if self._outside_wanted():
            self._outside(size, hooks)

    def _forward(self, feed: BlockFeed, index: int, recordings: list[Recording], size: int) -> None:
        hidden = self.state.load("input", index)["hidden"].split(size)
        block = self.model.install(*feed.take())
        linear = self._linear(index)
        outputs = []
        with self.phases.time("forward"), torch.no_grad():
            for recording, inputs in zip(recordings, hidden, strict=True):
                args, kwargs = recording.calls[index]
                with linear.group(*inputs.shape[:2]):
                    outputs.append(first(block(inputs.to(self.model.device), *args, **kwargs)))
            output = torch.cat(outputs)
            self._require_finite(output, f"the output of decoder block {index}")
        self.model.remove(index)
        with self.phases.time("state"):
            self.state.save("input", index + 1, {"hidden": output})
        self.advance(1)

    def _linear(self, index: int) -> LinearFunctions:
        if self._recall is not None:
            self._recall.begin(index)
        return LinearFunctions(self.model.parameters(index), self.workers, self._recall)

    def _head(self, recordings: list[Recording], size: int, hooks: GradientHooks) -> None:
        last = len(self.model.blocks)
        groups = self._last_hidden(size)
        with self.phases.time("head"):
            head = self._head_walk(groups)
            losses = self._resident_head(groups) if head is None else self._streamed_head(groups, *head)
            gradient = torch.cat([_gradient(hidden) for hidden in groups])
        self._require_finite(losses, "the loss")
        self._require_finite(gradient, "the gradient after the last decoder block")
        self.reduction.finish(hooks.sums, {}, hooks.sums)  # those on this side of the blocks
        resident = torch.tensor(head is None)
        self.state.save("gradient", last, {"gradient": gradient, "losses": losses, "resident": resident})
        self.advance(1)

    def _head_walk(self, groups: list[Tensor]) -> tuple[list[Tensor], HeadWalk] | None:
        """What the head is given for each group, with the graph behind it; None for a head that cannot be cut."""
        if self.model.head is None:
            return None
        given = [self.model.before_head(hidden) for hidden in groups]
        walk = HeadWalk(self.model, torch.cat(given)[:, :-1], self._targets, self.phases, self.workers)
        return (given, walk) if walk.is_elementwise() else None

    def _streamed_head(self, groups: list[Tensor], given: list[Tensor], walk: HeadWalk) -> Tensor:
        """Backward through head and final norm into `groups`; the losses."""
        scores = walk.scores()
        gradient = functional.pad(scores.gradient, (0, 0, 0, 1))  # the last token predicts nothing
        for inputs, part in zip(given, gradient.split(len(groups[0])), strict=True):
            inputs.backward(part.to(inputs.dtype))
        if self._head_wanted():
            self.state.save("normaliser", 0, {"normaliser": scores.normaliser})
        return scores.losses

    def _resident_head(self, groups: list[Tensor]) -> Tensor:
        """The same with the whole head in memory, one sequence at a time."""
        model = self.model
        wanted = self._head_wanted()
        if model.embedding in wanted:
            raise CheckpointError(
                f"model {model.base.id}: its head is tied to the embedding and cannot be walked in pieces, so it has "
                "no Fisher: leave out --all-parameters"
            )
        model.load_head()
        linear = LinearFunctions(model.parameters_of_head(), self.workers)
        hooks = self.reduction.hooks({name: model.parameters_of_head()[name] for name in wanted}, 1)
        losses: list[Tensor] = []
        for hidden in groups:
            hidden.grad = torch.zeros_like(hidden)
            for row in range(len(hidden)):
                with linear.group(1, hidden.shape[1]):
                    logits = model.logits(hidden[row : row + 1])[0, :-1].float()
                    loss = functional.cross_entropy(logits, self._targets[len(losses)], reduction="sum")
                    loss.backward()
                losses.append(loss.detach().double())
        self.reduction.finish(wanted, linear.factors if wanted else {}, hooks.sums)
        return torch.stack(losses)

    def _backward(self, feed: BlockFeed, index: int, recordings: list[Recording], size: int) -> None:
        model = self.model
        carried = self.state.load("gradient", index + 1)
        hidden = self.state.load("input", index)["hidden"].split(size)
        gradients = carried["gradient"].split(size)
        block = model.install(*feed.take())
        parameters = model.parameters(index)
        linear = self._linear(index)
        hooks = self.reduction.hooks({name: parameters[name] for name in self.reduction.left(parameters)}, size)
        handed_on = []
        with self.phases.time("backward"):
            for recording, values, gradient in zip(recordings, hidden, gradients, strict=True):
                args, kwargs = recording.calls[index]
                inputs = values.to(model.device).requires_grad_()
                with linear.group(*inputs.shape[:2]):
                    first(block(inputs, *args, **kwargs)).backward(gradient.to(model.device))
                self.reduction.take(linear.factors)
                handed_on.append(_gradient(inputs))
            handed = torch.cat(handed_on)
            self._require_finite(handed, f"the gradient at decoder block {index}")
        with self.phases.time("square"):
            self.reduction.finish(parameters, linear.factors, hooks.sums)
        model.remove(index)
        with self.phases.time("state"):
            self.state.save("gradient", index, {**carried, "gradient": handed})
            self.state.forget("gradient", index + 1)
            if index + 1 < len(model.blocks) or not self._head_wanted():
                self.state.forget("input", index + 1)
        self.advance(1)

    def _outside(self, size: int, hooks: GradientHooks) -> None:
        """Carry the gradients at the first block's input on into the embedding, and finish what is not a block."""
        model, embedding = self.model, self.model.embedding
        wanted = self._outside_wanted()
        tied = embedding in self._head_wanted()
        table = model.model.get_input_embeddings().weight
        table.requires_grad_()
        at_input = []
        for ids, gradient in zip(self._local.split(size), self.state.load("gradient", 0)["gradient"], strict=True):
            table.grad = None
            embedded = model.record(ids).embedded
            if embedded.requires_grad:
                embedded.backward(gradient[None].to(model.device))
            at_input.append(torch.zeros_like(table) if table.grad is None else table.grad)
        wide = torch.promote_types(model.dtype, torch.float32)
        inputs = InputGradients(self._tokens.to(model.device), torch.stack(at_input).to(wide))
        if self._head_wanted() and (walk := self._head_walk(self._last_hidden(size))) is not None:
            normaliser = self.state.load("normaliser", 0)["normaliser"].to(model.device)
            names = {model.parts[name][0].tensor.name for name in self._head_wanted()}
            self.reduction.head(walk[1], normaliser, names, inputs if tied else None)
        if embedding in wanted and not tied:
            self.reduction.embedding(inputs)
        self.reduction.finish(wanted, {}, hooks.sums)

    def _load_outside(self) -> None:
        model = self.model
        model.load_embedding_rows(self._tokens)
        model.load_outside(skip={model.embedding, *({model.head} if model.head else model.parameters_of_head())})
        for parameter in model.parameters(None).values():
            parameter.requires_grad_(False)

    def _outside_wanted(self) -> list[str]:
        """Parameters outside the blocks that are wanted."""
        return list(self.reduction.left(self.model.outside))

    def _head_wanted(self) -> list[str]:
        return [name for name in self._outside_wanted() if name in self.model.names_of_head]

    def _last_hidden(self, size: int) -> list[Tensor]:
        hidden = self.state.load("input", len(self.model.blocks))["hidden"]
        return [group.to(self.model.device).requires_grad_() for group in hidden.split(size)]

    @property
    def _targets(self) -> Tensor:
        return self.ids.to(self.model.device)[:, 1:]

    def _require_finite(self, values: Tensor, what: str) -> None:
        for sequence, of_sequence in enumerate(values):
            if not of_sequence.isfinite().all():
                raise CheckpointError(
                    f"model {self.model.base.id}: {what} is not finite in sequence {sequence} (computed in "
                    f"{self.model.dtype}); try {self.reduction.dtype_option} float32"
                )


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("backward left no gradient")  # a bug of ours: a detached input or parameter
    return tensor.grad
