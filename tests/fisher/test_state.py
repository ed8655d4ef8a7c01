"""What a pass leaves for the next one: whole files or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.errors import TransferError
from streammerge.fisher.state import WalkState


@pytest.fixture
def state(tmp_path: Path) -> WalkState:
    return WalkState(tmp_path / "deep" / "walk")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_was_saved_is_loaded(state: WalkState, dtype: torch.dtype) -> None:
    tensors = {"hidden": torch.randn(2, 3, 5).to(dtype), "losses": torch.randn(3, 2, dtype=torch.float64).T}
    state.save("input", 7, tensors)
    found = WalkState(state.folder).load("input", 7)
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values)
        assert found[name].data_ptr() % 64 == 0, "as any tensor: products round by alignment"


def test_indices_are_numbers_in_order(state: WalkState) -> None:
    for index in (12, 3, 100, 0):
        state.save("input", index, {"x": torch.zeros(1)})
    state.save("gradient", 5, {"x": torch.zeros(1)})
    assert state.indices("input") == [0, 3, 12, 100] and state.indices("gradient") == [5]
    state.forget("input", 3)
    state.forget("input", 3)
    assert state.indices("input") == [0, 12, 100]


def test_a_half_written_file_is_not_there(state: WalkState) -> None:
    state.save("input", 1, {"x": torch.zeros(1)})
    (state.folder / "input-0002.partial").write_bytes(b"half")
    (state.folder / "input-0003.safetensors.partial").write_bytes(b"half")
    assert state.indices("input") == [1]


def test_an_interrupted_save_keeps_what_was_there(state: WalkState, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save("gradient", 1, {"x": torch.zeros(1)})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TransferError, match=r"gradient-0001.*No space left"):
        state.save("gradient", 1, {"x": torch.ones(1)})
    assert state.load("gradient", 1)["x"].item() == 0


def test_clear_forgets_the_latest_first(state: WalkState, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever is left after an interruption is the beginning of a walk."""
    for kind, indices in {"input": range(3), "gradient": range(2, 3), "normaliser": range(1)}.items():
        for index in indices:
            state.save(kind, index, {"x": torch.zeros(1)})
    forgotten: list[tuple[str, int]] = []
    plain = WalkState.forget

    def noted(self: WalkState, kind: str, index: int) -> None:
        forgotten.append((kind, index))
        plain(self, kind, index)

    monkeypatch.setattr(WalkState, "forget", noted)
    state.clear()
    assert forgotten == [("normaliser", 0), ("gradient", 2), ("input", 2), ("input", 1), ("input", 0)]
    assert not any(state.folder.iterdir())


def test_what_is_missing_or_cannot_be_made_is_a_transfer_error(state: WalkState, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"input-0004.*cannot be read"):
        state.load("input", 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferError, match="cannot be prepared"):
        WalkState(tmp_path / "file" / "walk")
