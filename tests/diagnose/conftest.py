"""Models of several architectures with their fine-tunes, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fisher.models import build, saved
from safetensors.torch import load_file, save_file
from tiny_models import WEIGHTS, State
from torch import Tensor

Family = Callable[[str], list[Path]]
KINDS = ["llama", "qwen2", "mixtral"]
SIZE = {"num_hidden_layers": 3}


def change(folder: Path, new: Callable[[str, Tensor], Tensor]) -> Path:
    """Replace every tensor of a single-file model by what is made of its name and value."""
    state = {name: new(name, value).contiguous() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def noisy(folder: Path, kind: str, seed: int) -> Path:
    """The model that all of this kind start from, plus noise a quarter of its spread."""
    model = build(kind, **SIZE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def average(folders: list[Path]) -> State:
    """The plain mean."""
    states = [load_file(folder / WEIGHTS) for folder in folders]
    return {name: torch.stack([s[name].double() for s in states]).mean(0).float() for name in states[0]}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The plain mean of the other three, a base of three blocks, two fine-tunes of it. No test may change them."""
    made: dict[str, list[Path]] = {}

    def get(kind: str) -> list[Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            sources = [saved(folder / "base", kind, **SIZE), noisy(folder / "a", kind, 1), noisy(folder / "b", kind, 2)]
            mean = average(sources)
            made[kind] = [change(saved(folder / "merged", kind, **SIZE), lambda name, _: mean[name]), *sources]
        return made[kind]

    return get
