"""Tiny models of every architecture listed, live and on disk, and the textbook's Fisher under the files' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from naive import naive_fisher
from tiny_models import State
from torch import Tensor
from transformers import AutoModelForCausalLM

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.fisher.store import FisherSettings

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SAMPLES, LENGTH = 4, 20
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen3_moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "mlp_only_layers": [1],
    },
}
MIXTURES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def build(kind: str, tied: bool = True, noise: float = 0.2, **changes: Any) -> Any:
    """A model in float32 with random weights; norms and biases too are no longer ones and zeros."""
    torch.manual_seed(0)
    options = {**SIZES, **ARCHITECTURES.get(kind, {}), "tie_word_embeddings": tied, **changes}
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def settings(**values: Any) -> FisherSettings:
    return FisherSettings.model_validate({"dtype": "float32", "samples": SAMPLES, "length": LENGTH, **values})


def saved(folder: Path, kind: str = "qwen2", tied: bool = True, **changes: Any) -> Path:
    build(kind, tied, **changes).save_pretrained(folder)
    return folder


def textbook(model: Any, samples: int = SAMPLES, length: int = LENGTH, seed: int = 42) -> tuple[State, float]:
    """`naive_fisher` of the live model under the names of the files; its experts are stacked there, apart here."""
    found, loss = naive_fisher(model, samples, length, seed)
    return apart(found, model.config.model_type), loss


def apart(state: State, kind: str) -> State:
    """Cut the stacked experts of a live mixture: `gate_up_proj[e]` is w1 above w3, `down_proj[e]` is w2."""
    cut: State = {}
    for name, values in state.items():
        match = re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
        if match is None:
            cut[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if kind == "mixtral" else name] = values
            continue
        gate, up, down = MIXTURES[kind]
        inside = "block_sparse_moe" if kind == "mixtral" else "mlp"
        for expert, of_expert in enumerate(values):
            halves = of_expert.chunk(2) if match[2] == "gate_up_proj" else (of_expert,)
            for leaf, part in zip((gate, up) if len(halves) == 2 else (down,), halves, strict=True):
                cut[f"{match[1]}.{inside}.experts.{expert}.{leaf}.weight"] = part
    return cut


def assert_close(found: State, expected: State, tolerance: float = 1e-5) -> None:
    """Norm of the difference over the norm of what is expected, of every tensor that was found.

    A Fisher of 1e-12 of the largest is rounding of gradients that are zero (the queries of one key), which differs
    between processors.
    """
    rounding = 1e-12 * max(float(values.double().norm()) for values in expected.values())
    for name, values in found.items():
        wanted = expected[name].double()
        distance = (values.double() - wanted).norm() / wanted.norm().clamp(min=max(rounding / tolerance, 1e-300))
        assert distance <= tolerance, f"{name}: {distance:.2e}"


class Collector:
    """A sink in memory: every element of a tensor must arrive exactly once before the tensor is done.

    Args:
        base: the checkpoint.
        finished: tensors of an earlier run with their means, None for those that were not reached.
    """

    def __init__(self, base: Checkpoint, finished: Mapping[str, float | None] | None = None) -> None:
        self._base, self._finished = base, finished or {}
        self._parts: dict[str, list[tuple[int, Tensor]]] = {}
        self.values: State = {}
        self.reached: dict[str, bool] = {}

    def has(self, name: str) -> bool:
        return name in self._finished

    def mean(self, name: str) -> float | None:
        return self._finished[name]

    def write(self, name: str, start: int, values: Tensor) -> float:
        assert name not in self.values, f"{name} is done"
        self._parts.setdefault(name, []).append((start, values.flatten().clone()))
        return values.double().sum().item()

    def done(self, name: str, reached: bool = True) -> None:
        info, at, pieces = self._base.info(name), 0, []
        for start, values in sorted(self._parts.pop(name, []), key=lambda part: part[0]):
            assert start == at, f"{name}: {start} comes after {at}"
            at += len(values)
            pieces.append(values)
        assert at == info.numel
        self.values[name], self.reached[name] = torch.cat(pieces).view(info.shape), reached

    def sync(self) -> None:
        assert not self._parts, "something is half-written"
