"""The demo: the package's pair, merged and scored; again in the same folder; never in a foreign one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streammerge import mini_l2s, verify
from streammerge.cli import main
from streammerge.demo import MARKER, METHODS, run, score_rows, verdict
from streammerge.errors import OutputExistsError

TWO = ("task_arithmetic", "fim_ties")
FEW = 3


def test_runs_scores_and_runs_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    scores = run(out, methods=TWO, limit=FEW, progress=False)
    assert torch.get_num_threads() == threads and transformers.utils.logging.get_verbosity() == verbosity
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "Fisher mean" in printed.out and "fim_ties beside the long model: " in printed.out
    assert f"The merges and the Fisher are in {out}" in printed.out
    assert list(scores) == ["base", "long", *TWO]
    assert {score["problems"] for score in scores.values()} == {FEW}
    assert all(verify(out / method)["ok"] for method in TWO)
    again = mini_l2s.score(out / "fim_ties", limit=FEW, progress=False)
    assert {**again, "seconds": 0} == {**scores["fim_ties"], "seconds": 0}

    base, _ = mini_l2s.pair()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (out / "fim_ties" / file).read_bytes() == (base / file).read_bytes()

    (out / "notes.txt").write_text("mine")
    assert list(run(out, methods=TWO, limit=FEW, progress=False)) == list(scores)
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "fim_ties", "fisher", "notes.txt", "task_arithmetic"]


def test_foreign_files_stay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "model.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds no earlier demo"):
        run(tmp_path)
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "linear", tmp_path / "linear" / "model.safetensors"]

    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        run(file)

    ours = tmp_path / "ours"
    (ours / METHODS[-1]).mkdir(parents=True)
    (ours / MARKER).touch()
    (ours / METHODS[-1] / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="thesis"):  # at once, not after everything else
        run(ours)
    assert not (ours / "fisher").exists()


def scored(**models: tuple[float, float]) -> dict[str, dict[str, Any]]:
    return {
        name: {"accuracy": accuracy, "mean_length": length, "problems": 100, "seconds": 1.0}
        for name, (accuracy, length) in models.items()
    }


def test_the_verdict_says_who_wins() -> None:
    wins = scored(base=(0.2, 5), long=(0.9, 100), linear=(0.5, 60), fim_ties=(0.88, 60))
    assert verdict(wins) == [
        "fim_ties beside the long model: accuracy -2.0 points, length -40%.",
        "Of the most accurate merges, within 10.0 points, fim_ties is the shortest: "
        "beside the long model: accuracy -2.0 points, length -40%.",
        "No other merge is at least as accurate and no longer than each of these: fim_ties.",
        "With 100 problems, the standard error of an accuracy is at most 5.0 points.",
    ]


def test_the_verdict_says_who_loses_and_what_to_take_instead() -> None:
    merges = {"linear": (0.95, 99.0), "ties": (0.93, 40.0), "karcher": (0.93, 41.0), "fim_ties": (0.6, 6.0)}
    told = verdict(scored(base=(1.0, 1), long=(1.0, 100), **merges))
    assert told[1] == "It does not keep the accuracy here."
    assert told[2].startswith("Of the most accurate merges, within 10.0 points, ties is the shortest: ")
    assert told[3].endswith(": linear, ties, fim_ties.")  # karcher is as accurate as ties, and longer


def test_the_table() -> None:
    header, rows = score_rows(scored(base=(0.25, 5), long=(0.9, 100), fim_ties=(0.888, 60.04)))
    assert header == ["model", "accuracy", "mean length", "of long", "seconds"]
    assert rows[0] == ["base", "25.0%", "5.0", "5%", "1.0"]
    assert rows[2] == ["fim_ties", "88.8%", "60.0", "60%", "1.0"]
