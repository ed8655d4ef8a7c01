"""How often every byte of the model is read, and how much of it is in memory: counted, not assumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from fisher.models import build, saved, settings
from tiny_models import content
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.fisher import fisher, head, linear, reduction, squares, walk
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.probes import random_tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Reads = dict[str, list[tuple[int, int]]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """(first byte, length) of every read of a tensor. The fingerprint, 192 bytes of each, does not count."""
    found: Reads = {}
    plain = Checkpoint.read_many

    def counted(self: Checkpoint, parts: Iterable[Any]) -> None:
        parts = list(parts)
        for info, start, buffer in parts:
            found.setdefault(info.name, []).append((start, len(buffer)))
        plain(self, parts)

    monkeypatch.setattr(Checkpoint, "read_many", counted)
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: "")
    return found


def times_read(reads: Reads, folder: Path, part: str) -> dict[str, float]:
    """How often each byte was read on average, by name, of the tensors with `part` in their names."""
    with Checkpoint.open(folder) as base:
        return {
            name: sum(length for _, length in reads.get(name, ())) / info.nbytes
            for name, info in base.tensors.items()
            if part in name
        }


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_blocks_are_read_twice_and_the_last_once(tmp_path: Path, reads: Reads, kind: str, everything: bool) -> None:
    folder = saved(tmp_path / "model", kind, num_hidden_layers=3)
    fisher(str(folder), tmp_path / "out", settings(all_parameters=everything), device="cpu")
    assert set(times_read(reads, folder, ".layers.0.").values()) == {2}
    assert set(times_read(reads, folder, ".layers.1.").values()) == {2}
    assert set(times_read(reads, folder, ".layers.2.").values()) == {1}
    assert times_read(reads, folder, "model.norm") == {"model.norm.weight": 1}


@pytest.mark.parametrize(
    ("places", "stay"),
    [({"": "cpu"}, {0, 1, 2}), ({"model": "disk", "model.layers.0": "cpu", "model.layers.2": "cpu"}, {0, 2})],
)
def test_blocks_that_stay_are_read_once(
    qwen2: Path, tmp_path: Path, reads: Reads, places: dict[str, str], stay: set[int]
) -> None:
    fisher(str(qwen2), tmp_path / "streamed", settings(), device="cpu")
    reads.clear()
    (tmp_path / "map.json").write_text(json.dumps(places))
    fisher(str(qwen2), tmp_path / "mapped", settings(), device="cpu", device_map=str(tmp_path / "map.json"))
    for index in range(3):
        once = index in stay or index == 2
        assert set(times_read(reads, qwen2, f".layers.{index}.").values()) == {1 if once else 2}
    assert content(tmp_path / "mapped") == content(tmp_path / "streamed")


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_of_the_embedding_the_rows_of_the_sample_are_read(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, tied: bool, everything: bool
) -> None:
    """And the head goes by in blocks of rows: once, or twice for its own Fisher."""
    monkeypatch.setattr(head, "head_rows", lambda row_bytes, tokens: 10)
    folder = saved(tmp_path / "model", "llama", tied)
    fisher(str(folder), tmp_path / "out", settings(samples=2, length=9, all_parameters=everything), device="cpu")
    row = 4 * 32
    sampled = random_tokens(97, 2, 9, 42).unique().tolist()
    expected = [(token * row, row) for token in sampled]
    walked = [(start * row, min(10, 97 - start) * row) for start in range(0, 97, 10)] * (2 if everything else 1)
    assert reads[EMBEDDING] == (expected + walked if tied else expected)
    assert reads.get(HEAD) == (None if tied else walked)


class Live(TorchDispatchMode):
    """Bytes of all storages from `least` bytes on that are alive, whoever holds them: Python, C++, the graph.

    Sees what every operation of the walk's thread returns, and what any thread gets from `torch.empty`. The weak
    references are torch's own: a storage that only the autograd graph holds is alive for them too. Not seen: what comes
    before the walk, where accelerate allocates each parameter for a moment and touches none.
    """

    def __init__(self, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lock = Lock()
        plain_empty: Callable[..., torch.Tensor] = torch.empty
        plain_run = walk.Walk.run

        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = plain_empty(*args, **kwargs)
            self._see(made)
            return made

        def run(itself: walk.Walk) -> None:
            with self, monkeypatch.context() as patch:
                patch.setattr(torch, "empty", empty)
                plain_run(itself)

        monkeypatch.setattr(walk.Walk, "run", run)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.least:
            return
        with self._lock:
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
            self.most = max(self.most, sum(size for _, size in self._alive.values()))


def walk_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing but weights is as large as a matrix of the tiny models."""
    monkeypatch.setattr(linear, "_SQUARES", {"cpu": (4, 16)})
    monkeypatch.setattr(linear, "_TILE", 256)
    monkeypatch.setattr(squares, "_PIECE", 256)
    monkeypatch.setattr(reduction, "_ZEROS", 256)
    monkeypatch.setattr(head, "head_rows", lambda row_bytes, tokens: 2048 // row_bytes)
    monkeypatch.setattr(head, "SQUARES", 256)


def layout_sizes(folder: Path) -> list[int]:
    with Checkpoint.open(folder) as base:
        return [layout.size for layout in BlockModel(base, torch.float32, torch.device("cpu")).layouts]


@pytest.mark.parametrize(
    ("kind", "dtype", "everything"),
    [
        ("qwen2", torch.float32, False),
        ("phi3", torch.bfloat16, True),
        ("mixtral", torch.bfloat16, True),
        ("gemma2", torch.float32, True),
    ],
)
def test_at_no_time_more_than_one_block_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, everything: bool
) -> None:
    """Nor anything else of the size of a matrix: no gradient, no weight in another dtype, no table, no logits."""
    walk_in_small_pieces(monkeypatch)
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    build(kind, **sizes).to(dtype).save_pretrained(tmp_path / "model")
    (block,) = set(layout_sizes(tmp_path / "model"))
    live = Live(32 * 64 * dtype.itemsize, monkeypatch)  # its smallest matrix
    made = settings(samples=1, length=3, all_parameters=everything)
    fisher(str(tmp_path / "model"), tmp_path / "out", made, device="cpu")
    assert live.most == block


def test_what_stays_is_in_memory_besides(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter counts: here every block."""
    walk_in_small_pieces(monkeypatch)
    (block,) = set(layout_sizes(qwen2))
    (tmp_path / "map.json").write_text('{"": "cpu"}')
    live = Live(block, monkeypatch)
    fisher(str(qwen2), tmp_path / "out", settings(), device="cpu", device_map=str(tmp_path / "map.json"))
    assert live.most == 3 * block
