"""The rows that selections begin with: which they are, from where they come, and that no merge depends on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import naive_ties
from safetensors.torch import load_file, save_file

import streammerge
from streammerge import row_reader
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.methods.api import RowBlock, TensorContext, Unit
from streammerge.row_reader import Input, Inputs, RowReader

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
ROWS, COLUMNS = 1600, 24


def save(folder: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    state = {NAME: torch.randn(ROWS, COLUMNS, generator=generator), NORM: torch.randn(COLUMNS, generator=generator)}
    folder.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": COLUMNS, "vocab_size": 40, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return save(tmp_path / "base", 0), save(tmp_path / "ft", 1)


@pytest.fixture
def opened(pair: tuple[str, str]) -> Iterator[tuple[Unit, dict[str, Inputs]]]:
    """The matrix and the norm as one unit."""
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as ft:
        contexts = tuple(TensorContext(name, tuple(base.tensors[name].shape), "BF16", 0) for name in (NORM, NAME))
        inputs = {c.name: Inputs(Input(base, base.tensors[c.name]), (Input(ft, ft.tensors[c.name]),)) for c in contexts}
        yield Unit("unit", contexts), inputs


def reader_of(opened: tuple[Unit, dict[str, Inputs]], buffer_bytes: int) -> RowReader:
    unit, inputs = opened
    reader = RowReader(buffer_bytes, False, lambda count: None)
    reader.load([(unit, inputs)])
    reader.open(unit)
    return reader


ALL = 4 * (ROWS + 1) * COLUMNS + 1024  # bytes of the unit


@pytest.mark.parametrize("where", ["fetched", "kept", "fetched a tile at a time", "loaded"])
def test_rows_are_evenly_spread_and_those_of_the_files(
    opened: tuple[Unit, dict[str, Inputs]], pair: tuple[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "loaded":  # as from the Hub
        monkeypatch.setattr(Checkpoint, "is_streamed", lambda self, info: True)
    if where == "fetched a tile at a time":
        monkeypatch.setattr("streammerge.methods.api.TILE_ELEMENTS", 8 * COLUMNS)
    reader = reader_of(opened, 64 * COLUMNS * 4 + 1024 if "tile" in where else ALL)
    if where == "kept":
        list(reader.blocks())
    blocks = [[values.clone() for values in block.stored] for block in reader.sample()]
    chosen = torch.arange(16, ROWS, 33)  # 48 of 1600 rows, from the middle of the first 33 on
    for found, folder in zip(zip(*blocks, strict=True), pair, strict=True):
        assert torch.equal(torch.cat(found), load_file(Path(folder) / "model.safetensors")[NAME][chosen])
    assert [len(base) for base, _ in blocks] == ([8] * 6 if "tile" in where else [48])
    assert sum(len(block.base) for block in reader.blocks()) == 1 + ROWS  # all are read all the same


def test_there_are_none_of_a_small_unit_nor_of_one_far_away(
    opened: tuple[Unit, dict[str, Inputs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reader, "FEWEST_SAMPLED", 1 + ROWS // row_reader.SAMPLED_OF)
    assert list(reader_of(opened, ALL).sample()) == []
    monkeypatch.undo()
    monkeypatch.setattr("streammerge.methods.api.TILE_ELEMENTS", 8 * COLUMNS)
    monkeypatch.setattr(Checkpoint, "is_streamed", lambda self, info: True)
    assert list(reader_of(opened, ALL // 2).sample()) == []


@pytest.mark.parametrize("max_ram", [64 << 20, 2 << 20])
def test_ties_of_models_with_a_sample_equal_the_naive_way(
    pair: tuple[str, str], tmp_path: Path, max_ram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in memory, or read anew for each pass."""
    monkeypatch.setattr("streammerge.methods.api.TILE_ELEMENTS", 1 << 10)
    base, ft = ({n: t.float() for n, t in load_file(Path(m) / "model.safetensors").items()} for m in pair)
    expected = naive_ties(base, [ft], [1.0], 0.2)[NAME].bfloat16()
    job: dict[str, Any] = {"base": pair[0], "models": [pair[1]], "method": "ties", "parameters": {"density": 0.2}}
    sampled = 0
    plain = RowReader.sample

    def counted(self: RowReader) -> Iterator[RowBlock]:
        nonlocal sampled
        for block in plain(self):
            sampled += len(block.base)
            yield block

    monkeypatch.setattr(RowReader, "sample", counted)
    streammerge.merge(job, tmp_path / "out", max_ram=max_ram, threads=1)
    assert sampled == 48
    monkeypatch.setattr(RowReader, "sample", lambda self: iter(()))
    streammerge.merge(job, tmp_path / "without", max_ram=max_ram, threads=1)
    for folder in ("out", "without"):
        assert torch.equal(load_file(tmp_path / folder / "model.safetensors")[NAME], expected)
