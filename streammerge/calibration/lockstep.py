"""Several models over the same tokens, in step: all through decoder block 0, then all through block 1, and so on.

One block is in work and one being read, of whatever model; between the blocks only the hidden states are kept. Forward
only. The Fisher's walk, which also goes back, is `fisher/walk.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel, Recording, first
from streammerge.fisher.feed import BlockFeed
from streammerge.fisher.linear import LinearFunctions
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import GROUP_TOKENS
from streammerge.workers import Workers


class Observer:
    """Looks on while models walk. A measurement overrides what it needs; blocks come in order."""

    def embedded(self, model: int, hidden: Tensor) -> None:
        """The input of the first block: hidden [sequences, length, hidden], one group of sequences after another."""

    def before(self, model: int, block: int, module: nn.Module, start: int) -> Sequence[RemovableHandle]:
        """A block is about to see the group that begins with sequence `start`: hooks to put on it meanwhile."""
        return ()

    def linear(self, model: int, block: int, parameter: str, start: int, weight: Tensor, inputs: Tensor) -> None:
        """A linear function of a block and its inputs [..., columns]; see `LinearFunctions`."""

    def output(self, model: int, block: int, hidden: Tensor) -> None:
        """The output of a block for one group."""

    def walked(self, block: int) -> None:
        """All models have been through the block."""

    def last(self, model: int, groups: list[Tensor]) -> None:
        """The outputs of the last block, by group: what the final norm is given."""


@dataclass
class Lockstep:
    """One walk.

    Args:
        models: nothing loaded.
        ids: token ids [samples, length], the same for all.
        observers: shown everything.
        workers: share the products on the CPU.
        advance: called once per block of each model.
        phases: takes the time.
    """

    models: Sequence[BlockModel]
    ids: Tensor
    observers: Sequence[Observer]
    workers: Workers
    advance: Callable[[int], object] = lambda steps: None
    phases: Phases = field(default_factory=Phases)

    def run(self) -> None:
        """Walk.

        Raises:
            CheckpointError: a non-finite weight or hidden state.
        """
        count, blocks = len(self.models), len(self.models[0].blocks)
        items = [item for block in zip(*(model.feed_blocks for model in self.models), strict=True) for item in block]
        with torch.no_grad():
            recordings = [record_groups(model, self.ids) for model in self.models]
            hidden = [[recording.embedded for recording in of_model] for of_model in recordings]
            for number, of_model in enumerate(recordings):
                for recording in of_model:
                    for observer in self.observers:
                        observer.embedded(number, recording.embedded)
            order = range(blocks * count)
            with BlockFeed(items, order, self.models[0].device, (), self.phases) as feed:
                for block in range(blocks):
                    for number in range(count):
                        _, raw = feed.take()
                        hidden[number] = self._through(number, block, raw, recordings[number], hidden[number])
                        self.advance(1)
                    for observer in self.observers:
                        observer.walked(block)
            for number in range(count):
                for observer in self.observers:
                    observer.last(number, hidden[number])

    def _through(
        self, number: int, block: int, raw: Tensor, recordings: Sequence[Recording], hidden: list[Tensor]
    ) -> list[Tensor]:
        model = self.models[number]
        module = model.install(block, raw)

        def observe(parameter: str, start: int, weight: Tensor, inputs: Tensor) -> None:
            for observer in self.observers:
                observer.linear(number, block, parameter, start, weight, inputs)

        linear = LinearFunctions(model.parameters(block), self.workers, observe=observe)
        outputs = []
        with self.phases.time("forward"):
            start = 0
            for recording, inputs in zip(recordings, hidden, strict=True):
                args, kwargs = recording.calls[block]
                hooks = [hook for observer in self.observers for hook in observer.before(number, block, module, start)]
                with linear.group(1, inputs.shape[1]):
                    outputs.append(first(module(inputs, *args, **kwargs)))
                for hook in hooks:
                    hook.remove()
                start += len(inputs)
                check_output(model, block, outputs[-1])
                for observer in self.observers:
                    observer.output(number, block, outputs[-1])
        model.remove(block)
        return outputs


def record_groups(model: BlockModel, ids: Tensor) -> list[Recording]:
    """Load what lies before the blocks and record what they are given, a group of sequences after the other.

    Args:
        model: nothing loaded.
        ids: token ids [samples, length].
    """
    tokens, local = ids.unique(return_inverse=True)
    model.load_embedding_rows(tokens)
    special = {model.embedding, *({model.head} if model.head else model.parameters_of_head())}
    model.load_outside(skip=special)
    recordings = []
    for group in local.to(model.device).split(max(1, GROUP_TOKENS // ids.shape[1])):
        recording = model.record(group)
        recordings.append(Recording(recording.embedded.detach(), recording.calls))
    return recordings


def check_output(model: BlockModel, block: int, hidden: Tensor) -> None:
    """Raise CheckpointError where a block's output is not finite."""
    if not hidden.isfinite().all():
        raise CheckpointError(
            f"model {model.base.id}: the output of decoder block {block} is not finite (computed in "
            f"{model.dtype}); try another compute dtype, such as float32"
        )
