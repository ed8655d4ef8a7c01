"""Models that cannot be merged: files that are no checkpoint, values that are no numbers, models unlike the base."""

from pathlib import Path
from shutil import rmtree

import pytest
import torch
from bad_input.faults import BROKEN, IN_FILE, UNLIKE, header_of
from bad_input.refusals import TASK_ARITHMETIC, Spoil, command, refused
from tiny_models import EMBEDDING, MATRIX, NORM, WEIGHTS, Models, Run, edit, put, put_header, put_index, spoil, tensors

# --- files that are no checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "ft2"])
@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model(models: Models, tmp_path: Path, run: Run, role: str, change: Spoil, words: list[str]) -> None:
    folder = getattr(models, role)
    change(folder)
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    message = refused(run, tmp_path, arguments, f"model {folder}", *words)
    assert message.count("\n") == 1
    assert refused(run, tmp_path, (*arguments, "--dry-run")) == message


def test_what_is_broken_above_is_whole_before(models: Models, tmp_path: Path, run: Run) -> None:
    put_index(models.ft)
    put_header(models.ft2, header_of(models.ft2 / WEIGHTS))
    assert run(*command(models, tmp_path, *TASK_ARITHMETIC)).code == 0


@pytest.mark.parametrize(("name", "value"), [(MATRIX, torch.nan), (NORM, torch.inf), (EMBEDDING, -torch.inf)])
@pytest.mark.parametrize("role", Models._fields)
def test_nan_and_inf(models: Models, tmp_path: Path, run: Run, role: str, name: str, value: float) -> None:
    folder = getattr(models, role)
    spoil(folder, name, value)
    words = (f"model {folder}, {IN_FILE}tensor '{name}' holds 1 non-finite values", "--allow-nonfinite")
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert refused(run, tmp_path, arguments, *words).count("\n") == 1
    assert run(*arguments, "--allow-nonfinite").code == 0
    bad = {name: ~values.isfinite() for name, values in tensors(tmp_path / "out").items()}
    assert [(n, int(mask.sum())) for n, mask in bad.items() if mask.any()] == [(name, 1)]
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_nan_in_any_dtype(models: Models, tmp_path: Path, run: Run, dtype: torch.dtype) -> None:
    edit(models.ft, lambda state: state.update({name: value.to(dtype) for name, value in state.items()}))
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert run(*arguments).code == 0
    rmtree(tmp_path / "out")
    put(models.ft, MATRIX, torch.full((32, 16), torch.nan).to(dtype))
    refused(run, tmp_path, arguments, f"model {models.ft}", MATRIX, "non-finite")


@pytest.mark.parametrize(("name", "value"), [(MATRIX, torch.nan), (NORM, torch.inf), (EMBEDDING, torch.nan)])
def test_nan_and_inf_before_a_fisher_pass(models: Models, tmp_path: Path, run: Run, name: str, value: float) -> None:
    spoil(models.base, name, value)
    words = (
        f"model {models.base}, {IN_FILE}tensor '{name}' holds 1 non-finite values",
        "repair it: it cannot be walked",
    )
    refused(run, tmp_path, command(models, tmp_path), *words)
    refused(run, tmp_path, command(models, tmp_path, "--allow-nonfinite"), *words)
    refused(run, tmp_path, ("fisher", "--base", models.base, "--out", tmp_path / "f", "-q"), *words)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["ft", "ft2"])
def test_nan_and_inf_where_blocks_are_scored(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, role: str, value: float
) -> None:
    folder = getattr(models, role)
    spoil(folder, MATRIX, value)
    arguments = command(models, tmp_path, "--fisher", saved_fisher)
    refused(run, tmp_path, arguments, f"model {folder}, {IN_FILE}tensor '{MATRIX}' holds 1 non-finite", "--allow")
    words = f"model {folder}: its task vector in decoder block 1 is not finite"
    refused(run, tmp_path, (*arguments, "--allow-nonfinite"), words, "choose a method that needs none")


# --- models that do not belong together -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["ft", "ft2"])
@pytest.mark.parametrize(("change", "words"), UNLIKE.values(), ids=UNLIKE)
def test_a_model_unlike_the_base(
    models: Models, tmp_path: Path, run: Run, role: str, change: Spoil, words: str
) -> None:
    folder = getattr(models, role)
    change(folder)
    summary = f"these models cannot be merged into {models.base}: {folder}: {words}"
    for method in ("task_arithmetic", "fim_ties"):
        arguments = command(models, tmp_path, "--method", method)
        message = refused(run, tmp_path, arguments, summary)
        assert message.count("\n") == 1
    assert refused(run, tmp_path, ("plan", *arguments[:6], *arguments[9:])) == message


def test_every_mismatch_of_every_model_at_once(models: Models, tmp_path: Path, run: Run) -> None:
    together = ("shape", "extra tensor", "architecture", "vocabulary in the config", "vocabulary in the tensor")
    for folder in (models.ft, models.ft2):
        for name in together:
            UNLIKE[name][0](folder)
    UNLIKE["heads"][0](models.ft2)
    lines = [f"{folder}: {UNLIKE[name][1]}" for folder in (models.ft, models.ft2) for name in together]
    lines.append(f"{models.ft2}: {UNLIKE['heads'][1]}")
    for arguments in (command(models, tmp_path), command(models, tmp_path, "--dry-run")):
        message = refused(run, tmp_path, arguments)
        assert sorted(message.splitlines()[1:]) == sorted(
            f"  - {line}" + (" in the base" if "counterpart" in line else "") for line in lines
        )


def test_integers_that_differ_cannot_be_averaged(models: Models, tmp_path: Path, run: Run) -> None:
    for number, folder in enumerate(models):
        put(folder, "model.position_ids", torch.tensor([1, 2, number // 2]))
    words = f"{models.ft2}: tensor 'model.position_ids' (I64) holds other values"
    refused(run, tmp_path, command(models, tmp_path, *TASK_ARITHMETIC), words)
