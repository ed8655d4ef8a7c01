"""`verify --sources`: tensors merged again from the inputs, and every way in which they may not be what they were."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_verify import edit_manifest, rewrite
from tiny_models import MATRIX, NORM, WEIGHTS, Models, Run, content, edit, tensors, write_text

import streammerge
from streammerge import verify
from streammerge.errors import IncompatibleCheckpointsError, RecipeError

Merged = Callable[..., Path]
EVERY = {"sample": "all"}


def tensors_of(out: Path) -> list[str]:
    return list(tensors(out))


@pytest.fixture
def fim(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> Path:
    """A merge by fim_ties whose Fisher was given."""
    out = tmp_path / "fim"
    models_of = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2)
    assert run(*models_of, "--fisher", saved_fisher, "--density", "0.3", "--out", out, "-q").code == 0
    return out


METHODS = {
    "task_arithmetic": (),
    "ties": ("--density", "0.3"),
    "dare_ties": ("--density", "0.5"),
    "karcher": ("--granularity", "block"),
    "fim_ta": ("--importance", "norm"),
}


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=METHODS)
def test_a_merge_is_what_its_sources_give(
    merged: Merged, run: Run, method: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    out = merged("out", "-m", method, *options, "--max-shard-size", "8KB")
    before = content(tmp_path)
    result = run("verify", out, "--sources", "--sample", "all", "-q")
    count = len(tensors_of(out))
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(f"{out}: {count} tensors merged again from the sources: identical\n")
    assert content(tmp_path) == before


def test_of_a_sample_only_its_tensors_are_read(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    from streammerge.checkpoints.checkpoint import Checkpoint

    out = merged("out")
    read: set[str] = set()
    plain = Checkpoint.read_many

    def noted(self: Checkpoint, parts: Any) -> None:
        parts = list(parts)
        read.update(info.name for info, _, _ in parts if self.id != str(out))
        plain(self, parts)

    monkeypatch.setattr(Checkpoint, "read_many", noted)
    first = verify(out, sources={"sample": 3})["sources"]["tensors"]
    assert (len(first), read) == (3, set(first))
    assert verify(out, sources={"sample": 3})["sources"]["tensors"] == first
    assert verify(out, sources={"sample": 3, "seed": 1})["sources"]["tensors"] != first


def test_one_changed_element_is_found_and_told(merged: Merged, run: Run) -> None:
    out = merged("out", "--max-shard-size", "8KB")
    was = tensors(out)[MATRIX][3, 5].item()

    def change(state: dict[str, torch.Tensor]) -> None:
        state[MATRIX][3, 5] = 9.0
        state[MATRIX][31, 15] += 1.0

    rewrite(out, change)
    assert verify(out)["ok"]
    result = run("verify", out, "--sources", "--sample", "all", "--json", "-q")
    report = json.loads(result.out)
    assert (result.code, report["ok"]) == (1, False)
    difference = {"tensor": MATRIX, "elements": 2, "first": [3, 5], "found": 9.0, "expected": was}
    assert report["sources"]["differing"] == [difference]
    expected = (
        f"tensor {MATRIX!r} is not what its sources give: 2 elements differ, the first at [3, 5], 9.0 instead of {was}"
    )
    assert report["problems"] == [expected]
    text = run("verify", out, "--sources", "--sample", "all", "-q").out
    assert f"{out}: {expected}\n" in text
    assert text.endswith("1 of them differ\n")


def test_a_flipped_sign_of_zero_is_a_difference(models: Models, merged: Merged) -> None:
    """Bit for bit, not value for value."""
    for folder in (models.base, models.ft):
        edit(folder, lambda state: state[NORM].zero_())
    out = merged("out", "--max-shard-size", "8KB")
    rewrite(out, lambda state: state[NORM].neg_(), NORM)
    (difference,) = verify(out, sources=EVERY)["sources"]["differing"]
    assert (difference["tensor"], difference["elements"], difference["first"]) == (NORM, 16, [0])


def test_fim_by_recorded_coefficients_and_by_derived_ones(fim: Path, saved_fisher: Path) -> None:
    sampled = verify(fim, sources={"sample": 5})
    assert sampled["ok"]
    assert sampled["sources"]["coefficients"] == "recorded"
    every = verify(fim, sources=EVERY)
    assert (every["ok"], every["sources"]["coefficients"]) == (True, "derived")
    assert every["sources"]["tensors"] == [n for s in fisher_order(fim) for n in s]

    def falsify(manifest: dict[str, Any]) -> None:
        for entry in manifest["tensors"].values():
            if entry.get("coefficient"):
                entry["coefficient"] = [0.9 * value for value in entry["coefficient"]]

    edit_manifest(fim, falsify)
    assert not verify(fim, sources={"sample": 30})["ok"]  # the recorded coefficients are those that were used
    assert verify(fim, sources=EVERY)["ok"]  # the derived ones are


def fisher_order(out: Path) -> list[list[str]]:
    return [list(load_file(path)) for path in sorted(out.glob("*.safetensors"))]


def test_a_fisher_that_was_measured_is_to_be_given(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run("--base", models.base, "--ft", models.ft, "--out", out, "-q").code == 0
    result = run("verify", out, "--sources", "-q")
    assert (result.code, result.out) == (1, "")
    assert "reads the Fisher that was measured for the merge" in result.err
    assert "give its folder with --fisher" in result.err
    assert run("verify", out, "--sources", "--fisher", saved_fisher, "--sample", "all", "-q").code == 0

    other = Path(copytree(saved_fisher, tmp_path / "other"))
    record = json.loads((other / "fisher.json").read_text())
    record["blocks"][1]["mean"] *= 1.001
    (other / "fisher.json").write_text(json.dumps(record))
    result = run("verify", out, "--sources", "--fisher", other, "-q")
    assert result.code == 1
    assert "is not the one of the merge: the mean of block 1 is" in result.err


def test_fim_without_trim_by_fisher_needs_none_for_a_sample(models: Models, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("--base", models.base, "--ft", models.ft, "-m", "fim_ta", "--out", out, "-q").code == 0
    result = run("verify", out, "--sources", "--sample", "50", "-q")
    assert result.code == 0, result.err
    assert "their coefficients taken from the manifest: identical" in result.out


@pytest.mark.parametrize("method", ["acm_ties", "sens", "regmean"])
def test_what_was_measured_on_a_text(models: Models, tmp_path: Path, run: Run, method: str) -> None:
    out = tmp_path / "out"
    text = write_text(models, tmp_path)
    merge = run("--base", models.base, "--ft", models.ft, "-m", method, *text, "--out", out, "-q")
    assert merge.code == 0, merge.err
    result = run("verify", out, "--sources", "--sample", "all", "-q")
    if method == "regmean":
        assert (result.code, result.out) == (1, "")
        assert "measures activations that no manifest keeps" in result.err
    else:
        assert result.code == 0, result.err
        assert "their coefficients taken from the manifest: identical" in result.out


def test_sources_that_moved_and_sources_that_changed(models: Models, merged: Merged, run: Run, tmp_path: Path) -> None:
    out = merged("out")
    moved = models.ft.rename(tmp_path / "moved")
    result = run("verify", out, "--sources", "-q")
    assert result.code == 1
    assert f"{models.ft}: there is no such folder any more: say where the model is now with --ft\n" in result.err
    assert run("verify", out, "--sources", "--ft", moved, "-q").code == 0
    with pytest.raises(IncompatibleCheckpointsError, match=f"expert: {models.ft2} is not what {models.ft} was"):
        verify(out, sources={"models": [str(models.ft2)]})
    with pytest.raises(RecipeError, match=r"2 fine-tuned model\(s\) given, the merge has 1"):
        verify(out, sources={"models": [str(moved), str(moved)]})
    state = load_file(moved / WEIGHTS)
    state[MATRIX][7, 7] += 1.0  # where no fingerprint looks
    save_file(state, moved / WEIGHTS, {"format": "pt"})
    report = verify(out, sources={"models": [str(moved)], "sample": "all"})
    assert [difference["first"] for difference in report["sources"]["differing"]] == [[7, 7]]


def test_integers_and_non_finite_values_are_compared_too(models: Models, merged: Merged) -> None:
    for folder in (models.base, models.ft):
        edit(folder, lambda state: state.update(counter=torch.arange(5)))
    edit(models.ft, lambda state: state[MATRIX].view(-1)[:1].fill_(torch.nan))
    out = merged("out", "--allow-nonfinite", "--max-shard-size", "8KB")
    assert verify(out, sources=EVERY)["ok"]
    rewrite(out, lambda state: state["counter"][2:].add_(1), "counter")
    (difference,) = verify(out, sources=EVERY)["sources"]["differing"]
    assert difference == {"tensor": "counter", "elements": 3, "first": [2], "found": 3.0, "expected": 2.0}


def test_options_of_sources_go_with_it(merged: Merged, run: Run) -> None:
    out = merged("out")
    for options in (("--sample", "3"), ("--ft", "x"), ("--base", "x"), ("--fisher", "x"), ("--sample-seed", "1")):
        result = run("verify", out, *options)
        assert (result.code, "goes with it" in result.err, "--sources" in result.err) == (2, True, True)
    assert run("verify", out, "--sources", "--sample", "some").code == 1


def test_another_version_is_told(merged: Merged) -> None:
    out = merged("out")
    edit_manifest(out, lambda manifest: manifest.update(version="0.0.1"))
    notes = verify(out, sources={})["sources"]["notes"]
    assert notes == [
        f"the merge is by version 0.0.1, this is {streammerge.__version__}: results may differ between versions"
    ]


def test_what_is_damaged_is_not_compared(merged: Merged) -> None:
    out = merged("out")
    raw = bytearray((out / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (out / WEIGHTS).write_bytes(raw)
    assert hashlib.sha256(raw).hexdigest() not in (out / "streammerge.json").read_text()
    assert "sources" not in verify(out, sources=EVERY)
