"""Blocks from the files to memory, one ahead: which bytes, when, and how many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WEIGHTS, edit

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, TransferError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.feed import BlockFeed, BlockLayout, Slot
from streammerge.fisher.names import Part
from streammerge.fisher.phases import Phases

CPU = torch.device("cpu")
Feed = Callable[..., BlockFeed]


@pytest.fixture
def feed(base: Checkpoint, block_model: BlockModel) -> Feed:
    def make(order: list[int], stay: tuple[int, ...] = (), phases: Phases | None = None) -> BlockFeed:
        return BlockFeed(block_model.feed_blocks, order, CPU, stay, phases or Phases())

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The block of every tensor that was read."""
    found: list[int] = []
    plain = Checkpoint.read_many

    def counted(self: Checkpoint, parts: Iterable[Any]) -> None:
        parts = list(parts)
        plain(self, parts)
        found.extend(int(info.name.split(".")[2]) for info, _, _ in parts)

    monkeypatch.setattr(Checkpoint, "read_many", counted)
    return found


def assert_block(base: Checkpoint, layout: BlockLayout, raw: torch.Tensor) -> None:
    for slot in layout.slots:
        (part,) = slot.parts
        assert torch.equal(slot.view(raw), base.tensor(part.tensor.name))


@pytest.mark.parametrize("order", [[0, 1, 2, 2, 1, 0], [2, 1, 0], [1, 2, 2, 1, 0], [0], [], [1, 0, 1, 0]])
@pytest.mark.parametrize("stay", [(), (0, 1, 2), (1,), (0, 2)])
def test_blocks_come_in_order(
    base: Checkpoint, block_model: BlockModel, feed: Feed, reads: list[int], order: list[int], stay: tuple[int, ...]
) -> None:
    with feed(order, stay) as running:
        for index in order:
            assert running.take()[0] == index
    known = len(block_model.layouts[0].slots)
    for block in range(3):
        visits = sum(1 for at, index in enumerate(order) if index == block and (at == 0 or order[at - 1] != block))
        assert reads.count(block) == known * (min(visits, 1) if block in stay else visits)
    with feed(order, stay) as running:
        for index in order:
            assert_block(base, block_model.layouts[index], running.take()[1])


def test_the_next_block_is_announced_and_no_further_one(
    feed: Feed, block_model: BlockModel, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[int] = []
    monkeypatch.setattr(Checkpoint, "will_need", lambda self, info: announced.append(int(info.name.split(".")[2])))
    with feed([0, 1, 2, 2, 1], stay=(0,)) as running:
        _, first = running.take()
        assert set(announced) == {1} and set(reads) == {0}, "told of, not read"
        _, second = running.take()
        assert set(announced) == {1, 2} and set(reads) == {0, 1}
        assert running.take()[1].data_ptr() == second.data_ptr() != first.data_ptr(), "one block's room, but for 0"
        running.take()
        assert announced.count(1) == 2 * announced.count(2), "on the way back too"
    assert len(announced) == 3 * len(block_model.layouts[0].slots)


def test_what_was_read_is_counted(base: Checkpoint, block_model: BlockModel, feed: Feed) -> None:
    phases = Phases()
    with feed([0, 1, 0], phases=phases) as running:
        for _ in range(3):
            running.take()
    sizes = [sum(part.tensor.nbytes for slot in layout.slots for part in slot.parts) for layout in block_model.layouts]
    assert phases.bytes_read == 2 * sizes[0] + sizes[1]
    assert phases.seconds["read"] > 0 and "copy" not in phases.seconds


def test_a_file_that_ends_early_is_an_error_of_take(qwen2: Path, tmp_path: Path) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    with Checkpoint.open(folder) as base:
        model = BlockModel(base, torch.float32, CPU)
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate(base.info("model.layers.2.mlp.up_proj.weight").start)
        with BlockFeed(model.feed_blocks, [0, 1, 2], CPU, (), Phases()) as running:
            running.take()
            running.take()
            with pytest.raises(TransferError, match="ended at byte"):
                running.take()


def test_a_value_that_is_not_finite_is_an_error_of_take(qwen2: Path, tmp_path: Path) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    edit(folder, lambda state: state["model.layers.1.mlp.up_proj.weight"][3:4].fill_(torch.nan))
    with Checkpoint.open(folder) as base:
        model = BlockModel(base, torch.float32, CPU)
        with BlockFeed(model.feed_blocks, [0, 1], CPU, (), Phases()) as running:
            running.take()
            with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight' holds 32 non-finite.*repair it"):
                running.take()


def test_leaving_early_leaves_no_thread(feed: Feed) -> None:
    with feed([0, 1, 2]) as running:
        running.take()
    with pytest.raises(RuntimeError, match="after shutdown"):
        running._reader.submit(print)


def test_slots_are_aligned_and_apart(tmp_path: Path) -> None:
    """Whatever the sizes and dtypes; what is read into one slot is seen through it alone."""
    made = {"a": torch.randn(3), "b": torch.randn(5, 7).bfloat16(), "c": torch.randn(()), "d": torch.randn(33).double()}
    save_file(made, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path, need_config=False) as base:
        layout = BlockLayout.of((name, t.shape, (Part(base.info(name), 0),)) for name, t in made.items())
        end = 0
        for slot, (name, values) in zip(layout.slots, made.items(), strict=True):
            assert (slot.parameter, slot.dtype, slot.shape) == (name, values.dtype, values.shape)
            assert slot.start % 64 == 0 and slot.start >= end
            end = slot.start + values.nbytes
        assert end <= layout.size < end + 64
        with BlockFeed([(base, layout)], [0], CPU, (), Phases()) as running:
            _, raw = running.take()
            for slot in layout.slots:
                assert torch.equal(slot.view(raw), made[slot.parameter])


def test_a_slot_is_a_view() -> None:
    raw = torch.zeros(128, dtype=torch.uint8)
    slot = Slot("x", torch.bfloat16, torch.Size([2, 3]), 64, ())
    slot.view(raw)[1, 2] = 1.0
    assert raw.nonzero().flatten().tolist() == [64 + 10, 64 + 11]
