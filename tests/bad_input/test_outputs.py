"""Output folders that are not free."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input.refusals import TASK_ARITHMETIC, command, refused
from tiny_models import MATRIX, Models, Run, edit_config, spoil

from streammerge.checkpoints.writer import CheckpointWriter

TAKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "is not empty": (lambda root: (root / "out").mkdir(), "out", "output folder {out} is not empty ('letter.txt')"),
    "is the base": (lambda root: None, "base", "output folder {out} is also an input: choose another --out"),
    "is a fine-tune": (lambda root: None, "ft2", "output folder {out} is also an input: choose another --out"),
    "is an input by another name": (
        lambda root: (root / "out").symlink_to(root / "ft", target_is_directory=True),
        "out",
        "output folder {out} is also an input: choose another --out",
    ),
    "lies in an input": (lambda root: None, "ft/deep/out", "output folder {out} lies inside {root}/ft: choose another"),
    "is a file": (lambda root: (root / "out").write_text("x"), "out", "output {out} is a file: choose another --out"),
    "lies in a file": (
        lambda root: (root / "f").write_text("x"),
        "f/out",
        "{out}/.streammerge: cannot be prepared: Not a",
    ),
    "has no possible name": (lambda root: None, "n" * 300, "cannot be an output folder: File name too long"),
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("prepare", "name", "words"), TAKEN.values(), ids=TAKEN)
def test_an_output_folder_that_is_not_free(
    models: Models,
    tmp_path: Path,
    run: Run,
    prepare: Callable[[Path], object],
    name: str,
    words: str,
    overwrite: tuple[str, ...],
) -> None:
    prepare(tmp_path)
    out = tmp_path / name
    if name == "out" and out.is_dir() and not out.is_symlink():
        (out / "letter.txt").write_text("dear reader")
    arguments = command(models, tmp_path, *TASK_ARITHMETIC, *overwrite, "--out", out)
    assert refused(run, tmp_path, arguments, words.format(out=out, root=tmp_path)).count("\n") == 1


def test_a_finished_merge_is_not_replaced_unasked(models: Models, tmp_path: Path, run: Run) -> None:
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert run(*arguments).code == 0
    refused(run, tmp_path, arguments, f"output folder {tmp_path / 'out'} is not empty", "--overwrite")
    (tmp_path / "out" / "mine").touch()
    refused(run, tmp_path, (*arguments, "--overwrite"), "also holds 'mine', which is not ours to remove")
    (tmp_path / "out" / "mine").unlink()
    spoil(models.ft, MATRIX, torch.nan)
    refused(run, tmp_path, (*arguments, "--overwrite"), "non-finite")


def test_nothing_is_left_of_folders_made_on_the_way(models: Models, tmp_path: Path, run: Run) -> None:
    spoil(models.ft, MATRIX, torch.nan)
    arguments = command(models, tmp_path, *TASK_ARITHMETIC, "--out", tmp_path / "a" / "b" / "c")
    refused(run, tmp_path, arguments, "non-finite")
    (tmp_path / "a").mkdir()
    refused(run, tmp_path, arguments, "non-finite")


def test_an_unfinished_run_of_another_recipe(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).code == 130
    words = [f"recipe.models[{number}].parameters.coefficient (0.7 -> 0.2)" for number in (0, 1)]
    refused(run, tmp_path, (*arguments, "--coefficient", "0.2"), f"unfinished run that differs in {', '.join(words)}: ")
    edit_config(models.ft2, max_position_embeddings=7)
    assert run(*arguments).code == 0
