"""A disk that is full or broken, at every single call of a small merge with FIM-TIES that measures its Fisher.

Whatever call fails: one clear line, no folder that loads as a checkpoint, and the same call goes on to the same bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from broken_disk import READS, WRITES, BrokenDisk, Call, ShortDisk
from safetensors import SafetensorError
from tiny_models import INDEX, Models, content
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.checkpoints import disk, writer
from streammerge.errors import StreammergeError

CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
SHARES = 8  # of the long version, for as many processes

Cases = Callable[[int], Iterable[tuple[int, str]]]  # of so many calls, those that fail, each with its errno


@pytest.fixture(scope="module")
def recipe(saved_models: Models) -> dict[str, Any]:
    return {
        "base": str(saved_models.base),
        "models": [str(saved_models.ft)],
        "method": "fim_ties",
        "fisher": {"samples": 2, "length": 8},
        "max_shard_bytes": 10_000,
    }


@pytest.fixture(autouse=True)
def _sync_after_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SYNC_SECONDS", -1.0)


@pytest.fixture(scope="module")
def expected(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """What an undisturbed run leaves; transformers loads it."""
    out = tmp_path_factory.mktemp("expected") / "out"
    merge(recipe, out)
    assert len(list(out.glob("*.safetensors"))) >= 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return content(out)


def merge(recipe: dict[str, Any], out: Path) -> None:
    streammerge.merge(recipe, out, device="cpu", threads=1)


def loads(out: Path) -> bool:
    """Whether transformers takes the folder for a model."""
    try:
        AutoModelForCausalLM.from_pretrained(out)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def calls_of(recipe: dict[str, Any], out: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of an undisturbed run."""
    whole = BrokenDisk(names)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", whole)
        merge(recipe, out)
    return whole.calls


def break_at(
    recipe: dict[str, Any],
    out: Path,
    names: tuple[str, ...],
    at: int,
    code: int,
    expected: dict[str, bytes | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run in which one call fails, and one that goes on."""
    rmtree(out, ignore_errors=True)

    def watch(call: Call) -> None:
        if (out / INDEX).exists():  # from the moment it is there, all is
            found = content(out)
            assert {name: found[name] for name in expected} == expected, call

    broken = BrokenDisk(names, at, code, watch)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", broken)
        try:
            merge(recipe, out)
        except StreammergeError as error:
            text = str(error)
            assert broken.failed is not None
            assert os.strerror(code) in text and "\n" not in text, (broken.failed, text)
            assert str(out) in text or "file " in text, (broken.failed, text)
        else:  # the call was not made this time, or nothing depends on it
            assert broken.failed is None or broken.failed.name in ("rmdir", "unlink"), broken.failed
            assert {name: content(out)[name] for name in expected} == expected
    if not (out / INDEX).exists():
        assert not loads(out)
    if content(out) != expected:
        merge(recipe, out)
    assert content(out) == expected, broken.failed


def every(step: int, share: int, shares: int, *codes: str) -> Cases:
    """One of so many shares of every `step`th call, the errnos in turn."""
    return lambda count: [(at, codes[at // step % len(codes)]) for at in range(step * share, count, step * shares)]


def every_single(*codes: str) -> list[Any]:
    """The long version: every call with every errno."""
    return [
        pytest.param(every(1, share, SHARES, code), id=f"all-{code}-{share}", marks=pytest.mark.full)
        for code in codes
        for share in range(SHARES)
    ]


def break_some(
    recipe: dict[str, Any],
    out: Path,
    names: tuple[str, ...],
    cases: Cases,
    expected: dict[str, bytes | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = len(calls_of(recipe, out, names, monkeypatch))
    for at, code in cases(count + count // 10):  # threads vary the count
        break_at(recipe, out, names, at, CODES[code], expected, monkeypatch)


@pytest.mark.parametrize(
    "cases",
    [*(pytest.param(every(4, share, 3, *CODES), id=f"some-{share}") for share in range(3)), *every_single(*CODES)],
)
def test_a_write_fails(
    recipe: dict[str, Any],
    expected: dict[str, bytes | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cases: Cases,
) -> None:
    break_some(recipe, tmp_path / "out", WRITES, cases, expected, monkeypatch)


@pytest.mark.parametrize("cases", [pytest.param(every(17, 0, 1, "EIO"), id="some"), *every_single("EIO")])
def test_a_read_fails(
    recipe: dict[str, Any],
    expected: dict[str, bytes | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cases: Cases,
) -> None:
    break_some(recipe, tmp_path / "out", READS, cases, expected, monkeypatch)


def test_the_calls_are_of_every_kind(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above break what they say."""
    writes = calls_of(recipe, tmp_path / "out", WRITES, monkeypatch)
    assert {call.name for call in writes} == {*WRITES, "open"}
    rmtree(tmp_path / "out")
    reads = calls_of(recipe, tmp_path / "out", READS, monkeypatch)
    assert {call.name for call in reads} == {*READS, "open"}
    for model in ("base", "ft"):  # their weights are read there
        assert any(call.name == "preadv" and f"/{model}/" in call.path for call in reads)


@pytest.mark.parametrize("most", [1, 1000])
def test_a_disk_that_does_a_little_at_a_time(
    recipe: dict[str, Any],
    expected: dict[str, bytes | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    short = ShortDisk(most)
    monkeypatch.setattr(disk, "os", short)
    merge(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert short.calls > 100_000 / most
