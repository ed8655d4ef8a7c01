"""What an error message advises can be done: it names options that the command has, and what really lies there."""

from __future__ import annotations

from pathlib import Path

import yaml
from tiny_models import Models, Run

QUICK = ("--fisher-samples", "1", "--fisher-length", "8", "-q")


def test_a_sweep_into_a_merge_names_no_option_that_it_lacks(models: Models, tmp_path: Path, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    assert run(*pair, "-m", "linear", "--out", tmp_path / "merged", "-q").code == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": str(models.base), "models": [str(models.ft)]}))
    result = run("sweep", path, "--set", "density=0.1", "--out", tmp_path / "merged")
    assert result.code == 1 and "--overwrite" not in run("sweep", "--help").out
    assert result.err.endswith("is not empty ('LICENSE'): choose another --out or empty it\n")


def test_a_fisher_is_no_merge(models: Models, tmp_path: Path, run: Run) -> None:
    command = ("fisher", "--base", models.base, "--out", tmp_path / "f", *QUICK)
    assert run(*command).code == 0
    result = run(*command)
    assert result.code == 1 and "choose another --out or replace that Fisher with --overwrite\n" in result.err
    assert run(*command, "--overwrite").code == 0


def test_a_folder_to_save_a_fisher_in_is_named_by_its_option(models: Models, tmp_path: Path, run: Run) -> None:
    """No merge is replaced by a Fisher, whatever --overwrite says."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    command = ("--base", models.base, "--ft", models.ft, "--out", tmp_path / "m", *QUICK, "--save-fisher")
    for folder, words in {
        "full": "is not empty ('notes.txt'): choose another --save-fisher or empty it",
        "base": "is also an input: choose another --save-fisher",
        "m/inside": "choose another --save-fisher",
    }.items():
        result = run(*command, tmp_path / folder)
        assert result.code == 1 and result.err.endswith(f"{words}\n")
