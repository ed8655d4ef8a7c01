"""One torch thread per test process, and the fixtures of the end-to-end tests.

The tests run side by side on all processors; several torch threads in each would wait for one another instead of
working (ten seconds became two minutes). Set before torch is imported, and inherited by what the tests start.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree

import pytest
import torch
from tiny_models import Models, Result, Run, save_models

from streammerge.cli import main

_MERGE = importlib.import_module("streammerge.merge")  # `streammerge.merge` is the function
_REPORT = _MERGE.draw_report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Merges leave no report.html, which differs from run to run, unless a test takes `reports`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_MERGE, "draw_report", lambda *args: {})
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges leave a report.html."""
    monkeypatch.setattr(_MERGE, "draw_report", _REPORT)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models that no test may change."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def saved_fisher(saved_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Fisher of the base, with the default settings. No test may change it."""
    out = tmp_path_factory.mktemp("fisher") / "fisher"
    assert main(["fisher", "--base", str(saved_models.base), "--out", str(out), "-q"]) == 0
    return out


@pytest.fixture
def models(saved_models: Models, tmp_path: Path) -> Models:
    """A copy of the models to be spoilt, in `tmp_path`."""
    return Models(*(Path(copytree(folder, tmp_path / folder.name)) for folder in saved_models))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def merged(models: Models, tmp_path: Path, run: Run) -> Callable[..., Path]:
    """Merge the tiny pair with task arithmetic into `tmp_path / name`."""

    def call(name: str = "merged", *options: object) -> Path:
        out = tmp_path / name
        arguments = ("--base", models.base, "--ft", models.ft, "--out", out, "-q", "-m", "task_arithmetic", *options)
        result = run(*arguments)
        assert result.code == 0, result.err
        return out

    return call
