"""Tiny models for the end-to-end tests, and ways to spoil a copy of one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
MATRIX, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

State = dict[str, Tensor]


class Models(NamedTuple):
    """A base model and two fine-tunes of it."""

    base: Path
    ft: Path
    ft2: Path


class Result(NamedTuple):
    """What a command left: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def save_models(folder: Path) -> Models:
    """A two-block Qwen2 with tied embeddings in float32, and two noisy copies of it, as transformers saves them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    generator = torch.Generator().manual_seed(7)
    models = Models(folder / "base", folder / "ft", folder / "ft2")
    for number, path in enumerate(models):
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(config).float()
        for parameter in model.parameters() if number else ():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(path)
        (path / "LICENSE").write_text(f"licence of {path.name}\n")
        (path / "README.md").write_text(f"card of {path.name}\n")
    return models


def give_tokenizer(folder: Path) -> None:
    """A tokenizer of the letters a to z and the space, as Qwen2 has it."""
    vocabulary = {letter: number for number, letter in enumerate(f"{ascii_lowercase}\u0120")}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_text(models: Models, folder: Path) -> tuple[str, ...]:
    """Give the base a tokenizer and write a calibration text: the options that name it."""
    give_tokenizer(models.base)
    path = folder / "calibration.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    return ("--calibration", str(path), "--calibration-samples", "4", "--calibration-length", "16")


def tensors(folder: Path) -> State:
    """Every tensor of a model, whatever its shards."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def edit(folder: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a single-file model."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def put(folder: Path, name: str, value: Tensor) -> None:
    """Add or replace one tensor."""
    edit(folder, lambda state: state.update({name: value}))


def spoil(folder: Path, name: str, value: float) -> None:
    """Set the last element of a tensor."""
    edit(folder, lambda state: state[name].view(-1)[-1:].fill_(value))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of a single-file model and leave the tensors' bytes alone."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    put_header(folder, json.dumps(header).encode())


def put_header(folder: Path, header: bytes, length: int | None = None) -> None:
    """Replace the header of a single-file model, announcing `length` bytes of it."""
    raw = (folder / WEIGHTS).read_bytes()
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    announced = struct.pack("<Q", len(header) if length is None else length)
    (folder / WEIGHTS).write_bytes(announced + header + data)


def put_index(folder: Path, **changes: str) -> None:
    """Turn a single file into one shard with an index, some of whose entries are changed."""
    names = [*load_file(folder / WEIGHTS)]
    (folder / WEIGHTS).rename(folder / SHARD)
    weight_map = dict.fromkeys(names, SHARD) | changes
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def content(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder (None)."""
    paths = sorted(root.rglob("*"))
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}
