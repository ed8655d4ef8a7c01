"""The bytes depend on recipe and inputs alone: not on threads, block sizes, shards, interruptions or hash seeds.

One set of SHA-256 sums, of every tensor, holds for the whole product; what is cut into the same shards is the same
file by file, manifest and card included.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from interrupted import Processes
from make_checkpoints import Shape, make_pair
from tiny_models import content

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint

TILES = 4  # of the embedding, the largest tensor: 2**17 elements each
SHAPE = Shape(128, 352, 2, 4, 2, TILES * 1024, True)
THREADS, TILES_READ, SHARDS, RESUMED, HASH_SEEDS = (1, 2), (1, 2, TILES), ("300KB", "5GB"), (False, True), (0, 1, 2)
METHODS = {
    "fim_ties": ("--fisher-samples", "2", "--fisher-length", "8", "--device", "cpu"),
    "dare_ties": ("--random-seed", "3"),
}


class Combination(NamedTuple):
    """One way to run a merge."""

    threads: int
    tiles: int
    shard: str
    resumed: bool
    hash_seed: int


PRODUCT = [Combination(*values) for values in product(THREADS, TILES_READ, SHARDS, RESUMED, HASH_SEEDS)]
SOME = [  # every value of every kind at least twice
    Combination(THREADS[i % 2], TILES_READ[i % 3], SHARDS[i // 3], RESUMED[i // 2 % 2], HASH_SEEDS[i // 2])
    for i in range(6)
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose embedding is read in several pieces where the budget is small."""
    return make_pair(SHAPE, tmp_path_factory.mktemp("wide") / "pair", say=lambda line: None)


@pytest.fixture(scope="module")
def seeded(wide: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Processes]]:
    """Processes of each hash seed."""
    with ExitStack() as stack:
        started = []
        for seed in HASH_SEEDS:
            folder = tmp_path_factory.mktemp("processes")
            started.append(stack.enter_context(Processes(wide[0], folder, {"PYTHONHASHSEED": str(seed)})))
        yield started


def budgets(method: str, pair: tuple[Path, Path], threads: int) -> dict[int, int]:
    """Tiles of the embedding that are read at once -> the --max-ram that makes it so, for every thread."""

    def buffer(max_ram: int) -> tuple[int, int]:
        recipe = {"base": str(pair[0]), "models": [str(pair[1])], "method": method}
        with streammerge.plan(recipe, max_ram=max_ram, threads=threads) as planned:
            assert planned.budget.workers == threads
            return planned.budget.buffer_bytes, planned.budget.scratch_bytes

    whole, scratch = buffer(1 << 30)
    found = {tiles: threads * (scratch + whole * tiles // TILES) for tiles in TILES_READ}
    assert [buffer(found[tiles])[0] for tiles in TILES_READ] == [whole * tiles // TILES for tiles in TILES_READ]
    return found


def sums(folder: Path) -> dict[str, str]:
    with Checkpoint.open(folder) as model:
        found = {}
        for name, info in model.tensors.items():
            raw = bytearray(info.nbytes)
            model.read_into(info, 0, memoryview(raw))
            found[name] = hashlib.sha256(raw).hexdigest()
        return found


@pytest.mark.parametrize(
    "combinations", [pytest.param(SOME, id="some"), pytest.param(PRODUCT, id="all", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_depend_on_recipe_and_inputs_alone(
    wide: tuple[Path, Path], seeded: list[Processes], tmp_path: Path, method: str, combinations: list[Combination]
) -> None:
    for number, values in enumerate(Combination._fields):
        assert {combination[number] for combination in combinations} == {c[number] for c in PRODUCT}, values
    max_ram = {threads: budgets(method, wide, threads) for threads in THREADS}
    with Checkpoint.open(wide[0]) as base:
        names = sorted(base.tensors)
    draw = random.Random(0)
    tensors: set[tuple[tuple[str, str], ...]] = set()
    files: dict[str, dict[str, bytes | None]] = {}
    for number, use in enumerate(combinations):
        out = tmp_path / str(number)
        budget = ("--threads", use.threads, "--max-ram", max_ram[use.threads][use.tiles])
        models = ("--base", wide[0], "--ft", wide[1], "-m", method, *METHODS[method])
        command = (*models, *budget, "--max-shard-size", use.shard, "--out", out, "-q")
        run = seeded[use.hash_seed].run
        if use.resumed:
            step = f"after complete {draw.choice(names)}"  # of the Fisher, where there is one
            killed = run(*command, at=step, sync_seconds=0.0, threads=use.threads)
            assert killed.status == -signal.SIGKILL, (killed.steps[-1], killed.err)
        ended = run(*command, threads=use.threads)
        assert ended.status == 0, ended.err
        tensors.add(tuple(sums(out).items()))
        assert files.setdefault(use.shard, content(out)) == content(out), use
    assert len(tensors) == 1
    assert len({len(of_shard) for of_shard in files.values()}) == len(SHARDS)
