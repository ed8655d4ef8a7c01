"""What is done with each tensor of the output, and which of them are done together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.compatibility import Match
from streammerge.methods.api import Method, TensorContext, Unit

# Merged, copied from the base, or copied after a check that all inputs agree.
Action = Literal["merge", "copy", "same"]


def action_on(tensor: TensorContext, method: Method, base: Checkpoint, matches: Sequence[Match]) -> Action:
    """What is done with a tensor of the base, given each expert's tensors under the base's names."""
    everywhere = all(tensor.name in match.tensors for match in matches)
    if not method.merges(tensor) or tensor.numel == 0 or not everywhere:
        return "copy"
    return "merge" if base.tensors[tensor.name].floating else "same"


def units_of(tensors: Sequence[TensorContext], actions: Mapping[str, Action], method: Method) -> list[Unit]:
    """The units in the order of their first tensor."""
    groups: dict[str, list[TensorContext]] = {}
    for tensor in tensors:
        key = method.unit_of(tensor) if actions[tensor.name] == "merge" else tensor.name
        groups.setdefault(key, []).append(tensor)
    return [Unit(key, tuple(group)) for key, group in groups.items()]


def surveyed(tensors: Sequence[TensorContext], actions: Mapping[str, Action], method: Method) -> list[TensorContext]:
    """The tensors the method looks at before it merges anything."""
    return [tensor for tensor in tensors if actions[tensor.name] == "merge" and method.survey(tensor) is not None]


def with_fisher(tensors: Sequence[TensorContext], actions: Mapping[str, Action], method: Method) -> list[str]:
    """The tensors that a Fisher must hold."""
    looked_at = {tensor.name for tensor in surveyed(tensors, actions, method)} if method.needs_fisher else set()
    merged = [tensor for tensor in tensors if actions[tensor.name] == "merge"]
    return [tensor.name for tensor in merged if tensor.name in looked_at or method.reads_fisher(tensor)]
