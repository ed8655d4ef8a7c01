"""Models, folders and recipes named by a path do as those named by a text; what is neither is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import Models, content

import streammerge
from streammerge.checkpoints.locate import open_model, require_pinned
from streammerge.errors import CheckpointError, RecipeError
from streammerge.evaluation.compare import _names

QUICK = {"samples": 1, "length": 8}


class Elsewhere:
    """A path that is no pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [Path, Elsewhere])
def test_a_merge_of_paths_is_the_merge_of_their_texts(
    models: Models, tmp_path: Path, kind: Callable[[Path], os.PathLike[str]]
) -> None:
    """With a Fisher that is named by a path too, and from a recipe that is a file."""
    base, ft, ft2 = (kind(path) for path in models)
    fisher = tmp_path / "fisher"
    streammerge.fisher(base, kind(fisher), QUICK, device="cpu")
    recipe = {"base": base, "models": [ft, {"model": ft2}], "fisher_from": [kind(fisher)], "fisher": QUICK}
    texts = {"base": str(models.base), "models": [str(models.ft), str(models.ft2)], "fisher_from": str(fisher)}
    texts["fisher"] = QUICK
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(texts))
    streammerge.merge(texts, tmp_path / "texts")
    streammerge.merge(recipe, kind(tmp_path / "paths"))
    streammerge.merge({**recipe, "models": (ft, ft2), "fisher_from": kind(fisher)}, tmp_path / "tuple")
    streammerge.merge(kind(tmp_path / "recipe.yaml"), tmp_path / "file")
    streammerge.merge(str(tmp_path / "recipe.yaml"), tmp_path / "file named by a text")
    expected = content(tmp_path / "texts")
    for name in ("paths", "tuple", "file", "file named by a text"):
        assert content(tmp_path / name) == expected
    with streammerge.plan(tmp_path / "recipe.yaml") as planned:
        assert planned.base.id == str(models.base) and planned.recipe.fisher_from == [str(fisher)]
    assert streammerge.verify(kind(tmp_path / "paths"))["ok"]


@pytest.mark.parametrize("kind", [Path, Elsewhere])
def test_a_diagnosis_of_paths(models: Models, kind: Callable[[Path], os.PathLike[str]]) -> None:
    found = [
        streammerge.diagnose(model, against, QUICK, device="cpu")
        for model, against in [
            (str(models.ft), [str(models.base)]),
            (kind(models.ft), [kind(models.base)]),
            (kind(models.ft), kind(models.base)),
        ]
    ]
    assert found[0] == found[1] == found[2]


def test_what_runs_elsewhere_takes_paths_too(models: Models, tmp_path: Path) -> None:
    """Calibration texts, settings of an evaluation, code that must be pinned; the models of a comparison."""
    settings = streammerge.make_recipe({"base": models.base, "models": [models.ft], "calibration": {"text": Path("t")}})
    assert (settings.base, settings.models[0].model) == (str(models.base), str(models.ft))
    assert settings.calibration.text == ["t"]
    assert streammerge.FisherSettings(probe_text=Path("p")).probe_text == "p"
    require_pinned(models.base)
    with open_model(models.base) as opened:
        assert opened.id == str(models.base)
    with pytest.raises(CheckpointError, match="brings no tokenizer"):
        streammerge.evaluate(models.base, {"tasks": "mini_l2s", "limit": 1}, device="cpu")
    with pytest.raises(RecipeError, match=f"--compare: {models.base} is given twice"):
        streammerge.compare([models.base, str(models.base)])
    with pytest.raises(CheckpointError, match="brings no tokenizer"):
        streammerge.compare([models.base, models.ft], {"tasks": "mini_l2s", "limit": 1}, device="cpu")
    assert _names(["a/x", "b/x"]) == {"a/x": "a-x", "b/x": "b-x"}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a number for a model": (lambda: streammerge.diagnose(3, "x"), "model 3: name it by a text or a path"),
    "bytes for a model": (lambda: streammerge.compare(["a", b"b"]), "model b'b': name it by a text"),
    "one text to compare": (
        lambda: streammerge.compare("results/base"),
        "--compare: give a list of models, or of folders of results, not results/base alone",
    ),
    "one path to compare": (lambda: streammerge.compare(Path("r")), "give a list of models, .*, not r alone"),
    "a list for a recipe": (
        lambda: streammerge.plan([]),
        "recipe: give a mapping, or the path of a YAML file, not a list",
    ),
    "a recipe that is not there": (lambda: streammerge.merge("r.yaml", "out"), "recipe r.yaml: No such file"),
    "a number for a list": (
        lambda: streammerge.sweep({"base": "a", "models": ["b"]}, {"density": 0.1}, "out"),
        r"--set density: give a list of values, also for one alone: \[0.1\]",
    ),
    "a text for a list": (
        lambda: streammerge.sweep({"base": "a", "models": ["b"]}, {"method": "ties"}, "out"),
        r"--set method: give a list of values, also for one alone: \['ties'\]",
    ),
    "a list for a grid": (
        lambda: streammerge.sweep({"base": "a", "models": ["b"]}, ["density=0.1"], "out"),
        "a grid is a mapping of keys and lists of values",
    ),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_names_nothing_is_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_documented_sweep_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs, and every call of it is one that plans."""
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text("utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    seen: list[Any] = []

    def planned(recipe: Any, grid: dict[str, list[Any]], out: str, **options: Any) -> dict[str, Any]:
        with streammerge.plan({**recipe, "parameters": {key: values[0] for key, values in grid.items()}}) as job:
            seen.append(json.dumps(job.summary()))
        return {"points": [{"settings": {}, "front": True}]}

    monkeypatch.setattr(streammerge, "sweep", planned)
    exec(code, {})
    assert len(seen) == 1
