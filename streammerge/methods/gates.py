"""Which rows are gate projections, told from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from streammerge.methods.api import RowBlock, TensorContext

if TYPE_CHECKING:
    from torch import Tensor

_GATE = re.compile(r"\bgate_proj\b|\bexperts\.\d+\.w1\b")  # of w1, w2, w3 in an expert, w1 is the gate
_FUSED = re.compile(r"\bgate_up_proj\b")


def is_gate(name: str) -> bool:
    """Whether the whole tensor is a gate projection. A router is none."""
    return _GATE.search(name) is not None


def fused_gates(tensors: Iterable[TensorContext]) -> dict[str, int]:
    """The `gate_up_proj` matrices whose first I of every 2 I rows are a gate projection, with their I.

    Names do not tell [..., 2 I, H] from the transposed [..., H, 2 I] of other models. The shape [..., H, I] of the
    `down_proj` beside it does; where it says otherwise, or there is none, the tensor is left out.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors if tensor.is_matrix}
    found = {}
    for name, shape in shapes.items():
        down = shapes.get(_FUSED.sub("down_proj", name)) if _FUSED.search(name) else None
        if down and shape == (*down[:-2], 2 * down[-1], down[-2]):
            found[name] = down[-1]
    return found


def gate_rows(block: RowBlock, height: int) -> Tensor:
    """[r, 1], True at the rows that are gates: of the tensor's rows the first `height` of every 2 * `height`."""
    import torch

    rows = torch.arange(block.row, block.row + len(block.base), device=block.base.device)
    return (rows // height % 2 == 0).unsqueeze(1)
