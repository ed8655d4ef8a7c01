"""An unfinished run is finished by its own command only: another is told what differs, and may start anew."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import NORM, Models, Result, Run, content, edit, put

from streammerge.checkpoints.writer import CheckpointWriter

Options = dict[str, object]
Change = Callable[[Models, pytest.MonkeyPatch], Options]


def other_tensors(models: Models, patch: pytest.MonkeyPatch) -> Options:
    edit(models.ft, lambda state: state[NORM].add_(1))
    return {}


def other_shape(models: Models, patch: pytest.MonkeyPatch) -> Options:
    for model in models:
        put(model, "model.extra.weight", torch.ones(3))
    return {}


def other_version(models: Models, patch: pytest.MonkeyPatch) -> Options:
    patch.setattr(sys.modules["streammerge.merge"], "__version__", "99.0")
    return {}


CHANGES: dict[str, tuple[Change, str]] = {
    "a parameter": (lambda *_: {"--density": 0.25}, "recipe.models[0].parameters.density (0.5 -> 0.25)"),
    "the seed": (lambda *_: {"--random-seed": 2}, "recipe.parameters.random_seed (1 -> 2)"),
    "the method": (lambda *_: {"-m": "dare_ties"}, "recipe.method (dare_linear -> dare_ties)"),
    "the shards": (lambda *_: {"--max-shard-size": "9KB"}, "recipe.max_shard_bytes (5000000000 -> 9000)"),
    "a model": (lambda models, _: {"--ft": models.ft2}, "recipe.models[0].model ("),
    "the tensors of a model": (other_tensors, "expert {ft} (its tensors have changed): "),
    "the tensors of all": (other_shape, "base {base} (its tensors have changed), expert {ft} (its tensors"),
    "the version": (other_version, " -> 99.0): "),
}


def merge(run: Run, out: Path, options: Options, *flags: str) -> Result:
    return run(*(word for pair in options.items() for word in pair), "--out", out, "-q", *flags)


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_refused_and_told_why(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    change, words = CHANGES[what]
    options = {"--base": models.base, "--ft": models.ft, "-m": "dare_linear", "--density": 0.5, "--random-seed": 1}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert merge(run, out, options).code == 130
    options |= change(models, monkeypatch)
    left = content(out)
    refused = merge(run, out, options)
    assert refused.code == 1 and len(refused.err.splitlines()) == 1
    assert f"output folder {out} holds an unfinished run that differs in " in refused.err
    assert words.format(**models._asdict()) in refused.err
    assert "repeat that command to finish it, choose another --out, or start anew with --overwrite" in refused.err
    assert content(out) == left
    again = merge(run, out, options, "--overwrite")
    assert again.code == 0, again.err
    assert merge(run, tmp_path / "new", options).code == 0
    assert content(out) == content(tmp_path / "new")


def test_a_folder_whose_journal_is_gone_is_nobodys_to_take(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be the work of hours in it, and nothing says whose."""
    options = {"--base": models.base, "--ft": models.ft, "-m": "fim_ta", "--device": "cpu"}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert merge(run, out, options).code == 130
    for damage in (b"junk", b""):
        (out / ".streammerge" / "journal").write_bytes(damage)
        refused = merge(run, out, {**options, "-m": "fim_ties"})
        assert refused.code == 1
        assert "holds an unfinished run with a damaged journal: start anew with --overwrite" in refused.err
    assert merge(run, out, options, "--overwrite").code == 0
