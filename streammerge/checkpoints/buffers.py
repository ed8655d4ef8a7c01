"""Between torch tensors and the bytes of a file, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype and shape, as a view."""
    import torch

    if not values.is_contiguous() or values.device.type != "cpu":
        raise ValueError("only a contiguous CPU tensor can be viewed as bytes")
    return values.reshape(-1).view(torch.uint8).numpy().data
