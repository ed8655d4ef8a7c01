"""What goes into the linear layers, row by row, for regression means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streammerge.calibration.lockstep import Observer
from streammerge.calibration.store import entry
from streammerge.fisher.blocks import BlockModel

Save = Callable[[str, Mapping[str, Tensor]], None]


class LinearInputs(Observer):
    """X [rows, columns] of every linear layer in every model, for tokens evenly spread over the text.

    An expert's are the first that reach it. Handed on block by block of each model, in the dtype of the walk.

    Args:
        models: the models walked, by number of the walk.
        numbers: their numbers among all models, the base's 0.
        tokens: how many there are in all.
        rows: how many are kept.
        save: takes (file name without ending, entries).
    """

    def __init__(
        self, models: Sequence[BlockModel], numbers: Sequence[int], tokens: int, rows: int, save: Save
    ) -> None:
        self._models, self._numbers, self._save = models, numbers, save
        self._rows = min(rows, tokens)
        self._chosen = torch.arange(self._rows) * tokens // self._rows
        self._first, self._place, self._kept = 0, "", dict[str, list[Tensor]]()

    def before(self, model: int, block: int, module: nn.Module, start: int) -> Sequence[RemovableHandle]:
        self._first = start
        if start == 0:
            self._flush()  # what the model before left
            self._place = f"block-{block:04}"
        return ()

    def linear(self, model: int, block: int, parameter: str, start: int, weight: Tensor, inputs: Tensor) -> None:
        names = [tensor.name for tensor in self._models[model].tensors_behind(parameter, start, weight.numel())]
        self._keep(self._numbers[model], names, inputs, self._first if inputs.dim() > 2 else None)

    def last(self, model: int, groups: list[Tensor]) -> None:
        self._flush()
        self._place, head = "head", self._models[model].head_tensor
        if head is None:
            return
        first = 0
        for hidden in groups:
            self._keep(self._numbers[model], [head.name], self._models[model].before_head(hidden), first)
            first += len(hidden)
        self._flush()

    def _keep(self, model: int, names: Sequence[str], inputs: Tensor, first: int | None) -> None:
        """Rows of a group that begins with sequence `first`; None: of tokens that are not all there."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if first is not None:
            begin = first * inputs.shape[-2]
            here = self._chosen[(self._chosen >= begin) & (self._chosen < begin + len(rows))] - begin
            rows = rows[here.to(rows.device)]
        for name in names:
            kept = self._kept.setdefault(entry("inputs", model, name), [])
            room = self._rows - sum(len(piece) for piece in kept)
            if room > 0:
                kept.append(rows[:room].detach().cpu().clone())

    def _flush(self) -> None:
        if self._kept:
            model = next(iter(self._kept)).split(".")[1]
            self._save(f"{self._place}-of-{model}", {name: torch.cat(pieces) for name, pieces in self._kept.items()})
        self._kept = {}
