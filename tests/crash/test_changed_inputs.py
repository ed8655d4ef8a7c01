"""Inputs that change under a merge: nothing made from them is published, or gone on with."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MATRIX, WEIGHTS, Models, content

import streammerge
from streammerge.budget import run_bytes
from streammerge.checkpoints import disk
from streammerge.errors import CheckpointError, OutputExistsError, StreammergeError
from streammerge.methods import api
from streammerge.unit_work import Merge

FISHER = {"samples": 2, "length": 8}


def recipe(models: Models, method: str, **more: Any) -> dict[str, Any]:
    fisher = {"fisher": FISHER} if method.startswith("fim") else {}
    return {"base": str(models.base), "models": [str(models.ft), str(models.ft2)], "method": method, **fisher, **more}


def merge(job: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return streammerge.merge(job, out, device="cpu", threads=1, **options)


def place(path: Path, tensor: str) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end in a file, read without the code under test."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    start, stop = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    return 8 + length + start, 8 + length + stop


class FlippingDisk:
    """`os`, but a byte of a file has one bit flipped from its reading number `reading` on (0: the first)."""

    def __init__(self, path: Path, byte: int, bit: int, reading: int) -> None:
        self._path, self._byte, self._bit, self._reading = str(path), byte, bit, reading
        self.readings = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        count = os.preadv(fd, buffers, offset)
        if offset <= self._byte < offset + count and os.readlink(f"/proc/self/fd/{fd}") == self._path:
            if self.readings >= self._reading:
                buffers[0][self._byte - offset] ^= 1 << self._bit
            self.readings += 1
        return count


def samples(start: int, stop: int) -> set[int]:
    """The bytes that a fingerprint samples: 64 at the beginning, in the middle and at the end."""
    size = min(64, stop - start)
    return {at + k for at in (start, start + (stop - start - size) // 2, stop - size) for k in range(size)}


def a_byte(path: Path, tensor: str) -> int:
    """One that the fingerprint does not look at."""
    start, stop = place(path, tensor)
    return min(set(range(start + 80, stop)) - samples(start, stop))


# method, which model, options: why the tensor is read more than once
TWICE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "passes over a tensor that does not fit": ("ties", "ft", {"max_ram": 0}),
    "passes over the base's": ("ties", "base", {"max_ram": 0}),
    "Fisher and merge": ("fim_ta", "base", {}),
    "survey and merge": ("fim_ties", "ft2", {}),
    "Fisher, survey and merge in pieces": ("fim_ties", "base", {"max_ram": 0}),
}


def run_flipped(
    models: Models, out: Path, case: str, tensor: str, reading: int, monkeypatch: pytest.MonkeyPatch, bit: int = 0
) -> FlippingDisk:
    method, model, options = TWICE[case]
    job = recipe(models, method)
    if "max_ram" in options:
        options = {"max_ram": least_budget(job)}
    path = getattr(models, model) / WEIGHTS
    flipping = FlippingDisk(path, a_byte(path, tensor), bit, reading)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", flipping)
        merge(job, out, **options)
    return flipping


def least_budget(job: dict[str, Any]) -> int:
    """Bytes with which one tile of every tensor is all that fits."""
    with streammerge.plan(job, threads=1) as plan:
        tiles = (run_bytes(tensor, plan.inputs(tensor), tensor.tile_rows) for tensor in plan.contexts)
        return plan.budget.scratch_bytes + max(tiles)


@pytest.mark.parametrize("case", TWICE)
def test_a_bit_that_flips_between_two_readings(
    models: Models, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "TILE_ELEMENTS", 64)
    out = tmp_path / "out"
    never = 1000
    count = run_flipped(models, out, case, MATRIX, never, monkeypatch).readings
    assert count >= 2
    whole = content(out)
    for reading in range(1, count):
        again = tmp_path / f"again{reading}"
        with pytest.raises(CheckpointError) as caught:
            run_flipped(models, again, case, MATRIX, reading, monkeypatch, bit=reading % 8)
        model = getattr(models, TWICE[case][1])
        text = f"model {model}, file {WEIGHTS}: tensor {MATRIX!r} changed between two readings"
        assert str(caught.value).startswith(text)
        assert not again.exists()
        run_flipped(models, again, case, MATRIX, never, monkeypatch)
        assert content(again) == whole


# --- files that are written to meanwhile -----------------------------------------------------------------


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    """Other values of one tensor, where no fingerprint looks."""
    byte = a_byte(path, MATRIX)
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 4]))


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    rewrite(new)
    new.replace(path)


CHANGES = {"grows": grow, "shrinks": shrink, "is rewritten": rewrite, "is replaced": replace, "is removed": Path.unlink}


class Changing:
    """Changes a file after so many units were merged; then is quiet."""

    def __init__(self, change: Callable[[Path], object], path: Path, after: int) -> None:
        self._change, self._path, self._after = change, path, after
        self.merged: Counter[str] = Counter()
        self._plain = Merge.do

    def merge(self, work: Merge, reader: Any, unit: Any, *rest: Any) -> None:
        if self.merged.total() == self._after:
            self._change(self._path)
        self.merged[unit.key] += 1
        self._plain(work, reader, unit, *rest)


@pytest.mark.parametrize("model", ["base", "ft"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["task_arithmetic", "fim_ties"])
def test_a_file_that_changes_while_it_is_read(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, change: str, model: str
) -> None:
    job, path, out = recipe(models, method), getattr(models, model) / WEIGHTS, tmp_path / "out"
    monkeypatch.setattr("streammerge.row_reader.SMALL", 1)  # one unit at a time: what is merged later is read later
    with monkeypatch.context() as patch:
        changing = Changing(CHANGES[change], path, after=3)
        patch.setattr(Merge, "do", lambda *arguments: changing.merge(*arguments))
        with pytest.raises(StreammergeError) as caught:
            merge(job, out)
    text = str(caught.value)
    assert f"file {WEIGHTS}" in text and "\n" not in text
    assert text.startswith(f"model {path.parent}")
    assert not out.exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "fim_ties"])
def test_the_call_after_a_change_starts_from_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The fingerprint is the same: its samples miss the change."""
    job, out = recipe(models, method), tmp_path / "out"
    monkeypatch.setattr("streammerge.row_reader.SMALL", 1)
    with monkeypatch.context() as patch:
        changing = Changing(rewrite, models.ft / WEIGHTS, after=9)
        patch.setattr(Merge, "do", lambda *arguments: changing.merge(*arguments))
        with pytest.raises(CheckpointError):
            merge(job, out)
    merge(job, tmp_path / "fresh")
    merge(job, out)
    assert content(out) == content(tmp_path / "fresh")


class StoppedError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("model", ["base", "ft"])
@pytest.mark.parametrize("method", ["task_arithmetic", "fim_ties"])
def test_an_unfinished_run_of_other_inputs_is_not_gone_on_with(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, model: str
) -> None:
    def stop(path: Path) -> None:
        raise StoppedError

    job, out = recipe(models, method), tmp_path / "out"
    monkeypatch.setattr("streammerge.row_reader.SMALL", 1)
    with monkeypatch.context() as patch:
        changing = Changing(stop, models.ft, after=9)
        patch.setattr(Merge, "do", lambda *arguments: changing.merge(*arguments))
        with pytest.raises(StoppedError):
            merge(job, out)
    before = content(out)
    rewrite(getattr(models, model) / WEIGHTS)
    with pytest.raises(
        OutputExistsError,
        match=r"differs in (base|expert) .* \(model.safetensors was written to since\): .*--overwrite",
    ):
        merge(job, out)
    assert content(out) == before
    merge(job, out, overwrite=True)
    merge(job, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


def test_an_unfinished_fisher_of_another_base_is_not_gone_on_with(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.fisher.state import WalkState

    def stop(self: WalkState, kind: str, index: int) -> None:
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(WalkState, "forget", stop)
        streammerge.fisher(str(models.base), tmp_path / "fisher", FISHER, device="cpu")
    rewrite(models.base / WEIGHTS)
    with pytest.raises(OutputExistsError, match=r"differs in base .* \(model.safetensors was written to since\):"):
        streammerge.fisher(str(models.base), tmp_path / "fisher", FISHER, device="cpu")
