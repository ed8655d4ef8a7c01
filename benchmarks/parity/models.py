"""Tiny Llama checkpoints of numbers that look like real ones, for both tools to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 96, 2, 4, 2, 128
NORM, MATRIX, EMBEDDING = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"

State = dict[str, Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor: matrices of 512 to 4,096 elements, vectors of 32."""
    kv = HIDDEN * KV_HEADS // HEADS
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        found[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        found[prefix + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[prefix + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[prefix + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return found | {NORM: (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(
    task_rms: float, experts: int = 3, zeros: float = 0.25, larger: Mapping[str, tuple[int, ...]] | None = None
) -> list[State]:
    """A base and fine-tunes of it, float32.

    Matrices have a standard deviation of 0.02, norm weights are 1 +- 0.1. A task vector is heavy-tailed (products of
    two normals), its larger part common to all fine-tunes, as models tuned on related data have it.

    Args:
        task_rms: of the task vectors; 0.002 is that of real fine-tunes.
        zeros: share of exact zeros in a task vector.
        larger: tensors of another shape.
    """
    generator = Generator().manual_seed(0)
    models: list[State] = [{} for _ in range(experts + 1)]
    for name, shape in {**shapes(), **(larger or {})}.items():
        base = torch.randn(shape, generator=generator)
        base = base * 0.02 if len(shape) > 1 else 1 + 0.1 * base
        common = _heavy_tails(shape, generator)
        models[0][name] = base
        for tuned in models[1:]:
            moved = torch.rand(shape, generator=generator) >= zeros
            tuned[name] = base + task_rms * moved * (0.8 * common + 0.6 * _heavy_tails(shape, generator))
    return models


def _heavy_tails(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Mean 0, variance 1, kurtosis 9."""
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)


def save(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint that both tools take for a Llama; neither looks at the shapes."""
    folder.mkdir(parents=True)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def load(folder: Path) -> State:
    """Every tensor of a checkpoint, whatever its shards."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
