"""The benchmark of the memory calls every method as it must be called."""

from pathlib import Path

import memory
import pytest
from memory import calibration_text, main, make_models, options

from streammerge.methods import METHODS
from streammerge.methods.task_arithmetic import TaskArithmetic


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the method that needs most: two fine-tunes; the models are made once, the merges are removed."""
    main(["--shape", "tiny", "--out", str(tmp_path), "--methods", "model_stock"])
    *_, header, _, line = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (cells["| method"], cells["fine-tunes"], cells["before the merge"]) == ("| `model_stock`", "2", "-")
    assert 100 < float(cells["peak memory"].removesuffix(" MiB")) < 1000
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {path.parent.name for path in made} == {"base", "ft", "ft2"}
    make_models("tiny", tmp_path / "tiny")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == made


def test_every_method_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[str] = []
    monkeypatch.setattr(memory, "make_models", lambda shape, folder: None)
    monkeypatch.setattr(memory, "row", lambda method, folder, out: rows.append(method) or "")
    main(["--shape", "tiny", "--out", str(tmp_path), "--keep"])
    assert rows == list(METHODS)


def test_models_of_another_script_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(SystemExit, match="remove it, or choose another --out"):
        make_models("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(TaskArithmetic):
        calibration = ("inputs",)

    monkeypatch.setitem(METHODS, "measured", Measured)
    models = ["--base", "m/base", "--ft", "m/ft"]
    assert options("ties", Path("m")) == [*models, "--method", "ties"]
    assert options("model_stock", Path("m")) == [*models, "--ft", "m/ft2", "--method", "model_stock"]
    assert options("measured", Path("m")) == [*models, "--method", "measured", "--calibration", "m/calibration.txt"]


def test_the_calibration_text() -> None:
    text = calibration_text(10_050)
    assert len(text.split()) == 10_050 and len(text.splitlines()) == 101
    assert text == calibration_text(10_050) and text.isascii()
