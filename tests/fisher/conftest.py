"""Fixtures shared by the tests of `streammerge.fisher`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fisher.models import saved

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.fisher.blocks import BlockModel
from streammerge.workers import Workers


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-block Qwen2 in float32 with tied embeddings. No test may change it."""
    return saved(tmp_path_factory.mktemp("fisher") / "qwen2", num_hidden_layers=3)


@pytest.fixture
def base(qwen2: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(qwen2) as checkpoint:
        yield checkpoint


@pytest.fixture
def block_model(base: Checkpoint) -> BlockModel:
    """Nothing loaded."""
    return BlockModel(base, torch.float32, torch.device("cpu"))


@pytest.fixture
def one() -> Iterator[Workers]:
    """A single worker: the calling thread."""
    with Workers(1) as workers:
        yield workers
