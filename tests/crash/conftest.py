"""A pair large enough that a kill finds something under way, and the processes to be killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted import Processes
from make_checkpoints import Shape, make_pair

SMALL = Shape(64, 176, 4, 4, 2, 512, True)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model of four blocks and a fine-tune of it, which no test may change."""
    return make_pair(SMALL, tmp_path_factory.mktemp("crash") / "pair", say=lambda line: None)


@pytest.fixture(scope="module")
def processes(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(pair[0], tmp_path_factory.mktemp("processes")) as started:
        yield started
