"""How far from linear the decoder blocks are between a base model and its fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streammerge.calibration.lockstep import check_output, record_groups
from streammerge.diagnose.numbers import distances_from_linear, mean
from streammerge.fisher.blocks import BlockModel, Recording, first
from streammerge.fisher.feed import BlockFeed, BlockLayout
from streammerge.fisher.linear import LinearFunctions
from streammerge.fisher.phases import Phases
from streammerge.workers import Workers

_PIECE = 1 << 20  # weights interpolated at a time


@dataclass
class NonlinearityWalk:
    """The base walks; at every block, the fine-tuned block and the one between take the base's hidden states too.

    In memory: the interpolated block, the fine-tuned one or the base's, and the one being read.

    Args:
        base, tuned: nothing loaded.
        ids: token ids [samples, length].
        alpha: where between the two, 0 is the base.
        workers: share the products on the CPU.
        advance: called with the number of passes through a block that are done.
    """

    base: BlockModel
    tuned: BlockModel
    ids: Tensor
    alpha: float
    workers: Workers
    advance: Callable[[int], object] = lambda steps: None
    phases: Phases = field(default_factory=Phases)

    def run(self) -> list[dict[str, Any]]:
        """One mapping per block, as `diagnose` returns them.

        Raises:
            CheckpointError: a non-finite weight or hidden state.
        """
        base, tuned = self.base, self.tuned
        items = [item for pair in zip(base.feed_blocks, tuned.feed_blocks, strict=True) for item in pair]
        size = max(layout.size for layout in base.layouts)
        mixed = torch.empty(size, dtype=torch.uint8, device=base.device)
        rows = []
        with torch.no_grad():
            recordings = record_groups(base, self.ids)
            hidden = [recording.embedded for recording in recordings]
            with BlockFeed(items, range(len(items)), base.device, (), self.phases) as feed:
                for block, (ours, theirs) in enumerate(zip(base.layouts, tuned.layouts, strict=True)):
                    _, raw = feed.take()
                    start = self._through(block, raw, ours, recordings, hidden)
                    mixed[: ours.size].copy_(raw[: ours.size])
                    _, raw = feed.take()
                    end = self._through(block, raw, theirs, recordings, hidden)
                    interpolate(mixed, ours, raw, theirs, self.alpha, self.workers)
                    between = self._through(block, mixed, ours, recordings, hidden)
                    rows.append({"block": block, **self._compare(start, end, between)})
                    hidden = start
        return rows

    def _through(
        self, block: int, raw: Tensor, layout: BlockLayout, recordings: Sequence[Recording], hidden: Sequence[Tensor]
    ) -> list[Tensor]:
        """The block with these weights on the base's hidden states."""
        module = self.base.install(block, raw, layout)
        linear = LinearFunctions(self.base.parameters(block), self.workers)
        outputs = []
        for recording, inputs in zip(recordings, hidden, strict=True):
            args, kwargs = recording.calls[block]
            with linear.group(1, inputs.shape[1]):
                outputs.append(first(module(inputs, *args, **kwargs)))
            check_output(self.base, block, outputs[-1])
        self.base.remove(block)
        self.advance(1)
        return outputs

    def _compare(self, start: list[Tensor], end: list[Tensor], between: list[Tensor]) -> dict[str, float | None]:
        """Means over the sequences; None where a sequence has none."""
        found = [
            distances_from_linear(f0, f1, f, self.alpha)
            for groups in zip(start, end, between, strict=True)
            for f0, f1, f in zip(*groups, strict=True)
        ]
        names = ("nonlinearity", "relative_merging_error", "change")
        columns = zip(names, zip(*found, strict=True), strict=True)
        return {name: None if None in values else mean(values) for name, values in columns}


def interpolate(
    mixed: Tensor, ours: BlockLayout, raw: Tensor, theirs: BlockLayout, alpha: float, workers: Workers
) -> None:
    """theta0 + alpha (theta1 - theta0), in float32 or wider, rounded to the dtype of theta0 as in a merge.

    Args:
        mixed: the bytes of theta0, which the result takes the place of.
        ours: how they lie.
        raw, theirs: bytes of theta1, and how they lie.
        alpha: 0 leaves theta0, 1 gives theta1; where both are equal, so is the result, to the bit.
        workers: share the work.
    """
    sides = {slot.parameter: slot.view(raw).view(-1) for slot in theirs.slots}
    pieces = [
        (values[start : start + _PIECE], sides[slot.parameter][start : start + _PIECE])
        for slot in ours.slots
        for values in [slot.view(mixed).view(-1)]
        for start in range(0, values.numel(), _PIECE)
    ]

    def mix(piece: tuple[Tensor, Tensor]) -> None:
        inside, other = piece
        dtype = wide(inside.dtype, other.dtype)
        inside.copy_(torch.lerp(inside.to(dtype), other.to(dtype), alpha))

    workers.run(mix, pieces)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where one of them is, else float32, for float8 too."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
