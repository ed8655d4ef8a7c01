"""The whole models in memory, with hooks on their decoder blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import WEIGHTS, State
from torch import Tensor
from transformers import AutoModelForCausalLM


def whole(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def outputs(folder: Path, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What each decoder block puts out, [tokens, features] in float64."""
    return [output.flatten(0, 1).double() for _, _, output in calls(whole(folder, dtype), ids)]


def calls(model: Any, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Of each decoder block: its arguments, by place and by name, and its output."""
    found: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((args, kwargs, first(output)))

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def variance(hidden: Tensor) -> float:
    """Mean over the features of E[h^2] - E[h]^2."""
    return float((hidden.square().mean(0) - hidden.mean(0).square()).mean())


def rank(hidden: Tensor, singular: bool = False) -> float:
    """By a singular value decomposition of the centred matrix itself."""
    values = [float(v) for v in torch.linalg.svdvals(hidden - hidden.mean(0))]
    values = values if singular else [v * v for v in values]
    shares = [v / math.fsum(values) for v in values]
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


def block_vector(folder: Path, block: int) -> Tensor:
    """All tensors of a block in one vector, float64."""
    state: State = load_file(folder / WEIGHTS)
    inside = [state[name] for name in sorted(state) if name.startswith(f"model.layers.{block}.")]
    assert inside
    return torch.cat([value.flatten().double() for value in inside])


def angle(x: Tensor, y: Tensor) -> float:
    return 2 * math.asin(float((x / x.norm() - y / y.norm()).norm()) / 2)
