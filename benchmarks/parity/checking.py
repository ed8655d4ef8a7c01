"""What the checks of the intended differences share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parity.environment import PeerRefused
from parity.models import State, make_models
from streammerge import StreammergeError

ONE = {"weight": [1.0]}


class Changed(Exception):  # noqa: N818 - a finding
    """A tool does not behave as stated."""


def expect(holds: bool | Tensor, what: str) -> None:
    """Raises Changed where it does not hold."""
    if not holds:
        raise Changed(what)


def same(left: State, right: State) -> bool:
    """Whether two merges are the same bits."""
    return all(torch.equal(value, right[name]) and value.dtype == right[name].dtype for name, value in left.items())


def refused(merge: Callable[[], object]) -> str | None:
    """What a tool says when it refuses; None where it does not."""
    try:
        merge()
    except (PeerRefused, StreammergeError) as error:
        return str(error)
    return None


def with_tensor(name: str, base: Tensor, *task_vectors: Tensor) -> list[State]:
    """The near models with one tensor replaced: the base's, and task vectors added to it."""
    states = make_models(0.002, experts=len(task_vectors))
    for state, change in zip(states, (torch.zeros_like(base), *task_vectors), strict=True):
        state[name] = base + change
    return states


def as_bfloat16(states: list[State]) -> list[State]:
    return [{name: value.bfloat16() for name, value in state.items()} for state in states]
