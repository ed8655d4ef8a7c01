"""How large the base's activations are, per input channel of every module with a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streammerge.calibration.lockstep import Observer
from streammerge.fisher.blocks import BlockModel


class ChannelMagnitudes(Observer):
    """A_c = mean over the tokens of |x_c|, x [..., channels] what goes into a module of the base, in float64.

    Linear layers, whose weight has a column per channel; experts, over the tokens that reach them; norms, whose weight
    has an element per channel; a head of its own.

    Attributes:
        found: checkpoint tensor -> A [channels], float32.
    """

    def __init__(self, base: BlockModel) -> None:
        self._base = base
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def found(self) -> dict[str, Tensor]:
        return {name: (total / self._counts[name]).float() for name, total in self._sums.items()}

    def linear(self, model: int, block: int, parameter: str, start: int, weight: Tensor, inputs: Tensor) -> None:
        if model == 0:
            self._add((t.name for t in self._base.tensors_behind(parameter, start, weight.numel())), inputs)

    def before(self, model: int, block: int, module: nn.Module, start: int) -> Sequence[RemovableHandle]:
        return self._norm_hooks(module, f"{self._base.prefix}.{block}.") if model == 0 else ()

    def last(self, model: int, groups: list[Tensor]) -> None:
        if model != 0:
            return
        hooks = self._norm_hooks(self._base.model, "", set(self._base.outside))
        for hidden in groups:
            given = self._base.before_head(hidden)
            if self._base.head_tensor is not None:
                self._add([self._base.head_tensor.name], given)
        for hook in hooks:
            hook.remove()

    def _norm_hooks(self, module: nn.Module, prefix: str, among: set[str] | None = None) -> list[RemovableHandle]:
        """Hooks on the modules whose weight is a vector."""

        def look(names: Sequence[str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self._add(names, inputs[0])

            return before

        hooks = []
        for name, child in _with_vector(module):
            parameter = f"{prefix}{name}.weight"
            if parameter in self._base.parts and (among is None or parameter in among):
                names = [tensor.name for tensor in self._base.tensors_behind(parameter)]
                hooks.append(child.register_forward_pre_hook(look(names)))
        return hooks

    def _add(self, names: Iterable[str], inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        total = torch.zeros(rows.shape[-1], dtype=torch.float64)
        for piece in rows.split(64):
            total += piece.double().abs().sum(0).cpu()
        for name in names:
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + len(rows)


def _with_vector(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            yield name, child
