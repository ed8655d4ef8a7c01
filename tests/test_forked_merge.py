"""A merge by forks is the merge by threads: bytes, manifest, errors, what is noticed of inputs that change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import digests, recipe, small_tiles, trio
from tiny_models import Models

import streammerge
from streammerge import engine
from streammerge.budget import FORK_BYTES
from streammerge.errors import CheckpointError, TransferError
from streammerge.jobs import can_fork, in_forks
from streammerge.methods import METHODS
from streammerge.timeline import Timeline

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are of Linux")
fixtures = (small_tiles, trio)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have even the smallest merge done by forks; how many jobs they did each time."""
    calls: list[int] = []

    def counting(count: int, jobs: int, *rest: Any) -> None:
        calls.append(jobs)
        in_forks(count, jobs, *rest)

    monkeypatch.setattr(import_module("streammerge.plan"), "WORTH_FORKING", 0)
    monkeypatch.setattr("streammerge.row_reader.SMALL", 1)  # one unit at a time: many jobs
    monkeypatch.setattr(engine, "in_forks", counting)
    yield calls
    assert calls


@pytest.mark.parametrize("method", sorted(METHODS))
def test_forks_give_what_threads_give(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None, method: str
) -> None:
    job = recipe(trio, method)
    expected = streammerge.merge(job, tmp_path / "threads", threads=2)
    calls: list[int] = []
    monkeypatch.setattr(import_module("streammerge.plan"), "WORTH_FORKING", 0)
    monkeypatch.setattr(engine, "in_forks", lambda *given: (calls.append(given[1]), in_forks(*given)))
    assert streammerge.merge(job, tmp_path / "forks", threads=2) == expected
    assert digests(tmp_path / "forks") == digests(tmp_path / "threads")
    with streammerge.plan(job) as planned:
        assert len(calls) == (2 if planned.surveyed else 1)


@pytest.mark.parametrize("shards", [1500, 5000])
def test_resumed_by_forks(
    trio: dict[str, str], tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Stopped in the process that the forks tell, at every third tensor."""
    from streammerge.checkpoints.writer import CheckpointWriter

    job = {**recipe(trio, "ties"), "max_shard_bytes": shards}
    expected = streammerge.merge(job, tmp_path / "whole", threads=2)
    complete = CheckpointWriter.complete
    for limit in range(1, len(expected["tensors"]), 3):
        done: list[str] = []

        def stopping(self: CheckpointWriter, name: str, *rest: Any, limit: int = limit, done: list[str] = done) -> None:
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(name)
            complete(self, name, *rest)

        out = tmp_path / f"out{limit}"
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "complete", stopping)
            with pytest.raises(KeyboardInterrupt):
                streammerge.merge(job, out, threads=2)
        monkeypatch.setattr(CheckpointWriter, "complete", _refusing(complete, done))
        assert streammerge.merge(job, out, threads=2) == expected
        assert digests(out) == digests(tmp_path / "whole")
        monkeypatch.setattr(CheckpointWriter, "complete", complete)


def _refusing(complete: Callable[..., None], done: list[str]) -> Callable[..., None]:
    """`complete` that must not be told again of what is done."""

    def once(self: Any, name: str, *rest: Any) -> None:
        assert name not in done
        complete(self, name, *rest)

    return once


def test_a_bad_value_is_told_as_by_threads(trio: dict[str, str], tmp_path: Path, forked: list[int]) -> None:
    path = Path(trio["one"]) / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.gate_proj.weight"][3, 5] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="mlp.gate_proj.weight' holds 1 non-finite values") as caught:
        streammerge.merge(recipe(trio, "ties"), tmp_path / "out", threads=2)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full(
    trio: dict[str, str], tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    job = recipe(trio, "ties")
    parent = os.getpid()
    plain = engine.Engine._work

    def work(self: engine.Engine, *given: Any) -> None:
        with monkeypatch.context() as patch:  # not while the header is written
            patch.setattr("streammerge.checkpoints.disk.write_at", full)
            plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_work", work)
        with pytest.raises(TransferError, match="No space left on device"):
            streammerge.merge(job, tmp_path / "out", threads=2)
    assert os.getpid() == parent
    expected = streammerge.merge(job, tmp_path / "whole", threads=2)
    assert streammerge.merge(job, tmp_path / "out", threads=2) == expected


def test_what_the_survey_read_must_be_what_is_merged(
    trio: dict[str, str], tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksums come from the forks of the survey, and go to those of the merge."""
    path = Path(trio["base"]) / "model.safetensors"
    plain, labels = engine.Engine._work, []

    def work(self: engine.Engine, label: str, *given: Any) -> None:
        labels.append(label)
        if label == "Merge":
            status = path.stat()
            raw = bytearray(path.read_bytes())
            raw[-4 * 24 * 8 :] = bytes(4 * 24 * 8)
            path.write_bytes(raw)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        plain(self, label, *given)

    monkeypatch.setattr(engine.Engine, "_work", work)
    with pytest.raises(CheckpointError, match="changed between two readings"):
        streammerge.merge(recipe(trio, "fim_ties"), tmp_path / "out", threads=2)
    assert labels == ["Survey", "Merge"]


def test_verified_by_forks(trio: dict[str, str], tmp_path: Path, forked: list[int]) -> None:
    out = tmp_path / "out"
    streammerge.merge(recipe(trio, "ties"), out, threads=2)
    known = len(forked)
    assert streammerge.verify(out, sources={"sample": "all", "threads": 2})["ok"]
    assert len(forked) == known + 1


def test_the_forks_memory_is_in_the_phase(trio: dict[str, str], tmp_path: Path, forked: list[int]) -> None:
    seen: list[int] = []

    class Watched(Timeline):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "forks":
                seen.append(value)

    merging = import_module("streammerge.merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "Timeline", Watched)
        streammerge.merge(recipe(trio, "ties"), tmp_path / "out", threads=2)
    assert max(seen) > 0 and seen[-1] == 0


def test_after_a_fisher_of_this_process(saved_models: Models, tmp_path: Path, forked: list[int]) -> None:
    """Which leaves libraries with threads that a fork does not have."""
    job = {"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": "fim_ties"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.rand(600, 600)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert (values.to(dtype) @ values.to(dtype)).sum() > 0
        result = streammerge.merge(job, tmp_path / "out", device="cpu", threads=2)
    finally:
        torch.set_num_threads(threads)
    assert len(forked) == 2
    assert streammerge.merge(job, tmp_path / "again", device="cpu", threads=1)["shards"] == result["shards"]


def test_who_works(trio: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks only for several workers, local files, nothing pushed, and enough to do."""
    planning = import_module("streammerge.plan")
    with streammerge.plan(recipe(trio, "ties"), threads=2) as planned:
        assert not planned.by_forks
        small = planned.summary()["peak_host_bytes"]
        monkeypatch.setattr(planning, "WORTH_FORKING", 0)
        assert planned.by_forks
        assert planned.summary()["peak_host_bytes"] == small + 2 * FORK_BYTES
        monkeypatch.setattr(planning, "can_fork", lambda: False)
        assert not planned.by_forks
    monkeypatch.undo()
    monkeypatch.setattr(planning, "WORTH_FORKING", 0)
    with streammerge.plan(recipe(trio, "ties"), threads=1) as planned:
        assert not planned.by_forks
    with streammerge.plan(recipe(trio, "ties"), threads=2, uploads=True) as planned:
        assert not planned.by_forks
