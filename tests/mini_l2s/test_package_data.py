"""The pair comes with the package, whole, small and described."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import streammerge
from streammerge import mini_l2s
from streammerge.mini_l2s.tokenizer import make_tokenizer

ROOT = Path(streammerge.__file__).parent.parent
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
}
BASE, LONG = mini_l2s.pair()


@pytest.mark.parametrize("folder", [BASE, LONG], ids=["base", "long"])
def test_all_files_are_there(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_both_are_small() -> None:
    assert sum(path.stat().st_size for folder in (BASE, LONG) for path in folder.iterdir()) < 10_000_000


@pytest.mark.parametrize("folder", [BASE, LONG], ids=["base", "long"])
def test_the_tokenizer_is_that_of_the_problems(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert stored == make_tokenizer().get_vocab()


def test_a_wheel_has_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel as pip does")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "streammerge", tmp_path / "streammerge", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    names = set(zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).namelist())
    for model in ("base", "long"):
        prefix = f"streammerge/mini_l2s/pair/{model}/"
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == FILES
