"""A sweep on the tiny models: what each point scores, that nothing is done twice, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import MATRIX, Models, Run, content, spoil, tensors

import streammerge
from streammerge import mini_l2s
from streammerge.errors import OutputExistsError, RecipeError
from streammerge.methods import METHODS
from streammerge.recipe import DEFAULT_METHOD
from streammerge.sweep import evaluations, state
from streammerge.sweep.grid import parse_grid

run_module = import_module("streammerge.sweep.run")
DOCS = Path(__file__).parents[2] / "docs"

GRID: dict[str, list[Any]] = {"density": [0.1, 0.4], "theta": [0.05, 0.5, "adaptive"]}


class Calls:
    """What a sweep did: `log` has "fisher NAME", "merge POINT" and "score POINT" in order."""

    def __init__(self, base: Path) -> None:
        self.log: list[str] = []
        self.before: Callable[[str], None] = lambda call: None
        self._base = tensors(base)

    def note(self, call: str) -> None:
        self.before(call)
        self.log.append(call)

    def score(self, folder: Path, *, limit: int | None = None, progress: bool = True) -> Mapping[str, Any]:
        """Of a model: how many of its entries differ from the base's, and by how much. No two points share that."""
        self.note(f"score {folder.name}")
        changes = [(value - self._base[name]).double() for name, value in tensors(folder).items()]
        moved = sum(int((change != 0).sum()) for change in changes)
        total = sum(change.numel() for change in changes)
        length = sum(float(change.abs().sum()) for change in changes)
        return {
            "accuracy": moved / total,
            "mean_length": length,
            "truncated": 0.0,
            "problems": limit or 7,
            "seconds": 0,
        }

    def count(self, kind: str) -> int:
        return sum(call.startswith(kind) for call in self.log)


@pytest.fixture
def calls(models: Models, monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls(models.base)
    monkeypatch.setitem(evaluations.EVALUATIONS, "changes", seen.score)
    merge, fisher = run_module.merge, run_module.measure_fisher

    def noted_merge(recipe: Any, out: Path, **options: Any) -> Any:
        seen.note(f"merge {out.name}")
        return merge(recipe, out, **options)

    def noted_fisher(base: Any, out: Path, *rest: Any, **options: Any) -> Any:
        seen.note(f"fisher {out.name}")
        return fisher(base, out, *rest, **options)

    monkeypatch.setattr(run_module, "merge", noted_merge)
    monkeypatch.setattr(run_module, "measure_fisher", noted_fisher)
    return seen


@pytest.fixture
def recipe(models: Models) -> dict[str, Any]:
    return {"base": str(models.base), "models": [str(models.ft)], "fisher": {"samples": 2, "length": 16}}


def sweep(recipe: Mapping[str, Any], out: Path, grid: Mapping[str, list[Any]] = GRID, **options: Any) -> dict[str, Any]:
    return streammerge.sweep(recipe, grid, out, evaluation="changes", device="cpu", threads=1, **options)


def test_every_point_scores_what_its_merge_does(
    calls: Calls, recipe: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """Against merges made one by one, each with a Fisher of its own."""
    result = sweep(recipe, tmp_path / "sweep")
    assert [point["settings"] for point in result["points"]] == [
        {"density": density, "theta": theta} for density in GRID["density"] for theta in GRID["theta"]
    ]
    assert (calls.count("fisher"), calls.count("merge"), calls.count("score")) == (1, 6, 6)
    assert calls.log[0] == "fisher fisher", "before any merge"
    for number, point in enumerate(result["points"]):
        out = tmp_path / f"single-{number}"
        streammerge.merge({**recipe, "parameters": point["settings"]}, out, device="cpu", threads=1)
        assert point["scores"] == {**calls.score(out)}
    assert len({json.dumps(point["scores"]) for point in result["points"]}) == 6


def test_what_is_left_in_the_folder(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    result = sweep(recipe, tmp_path / "sweep", limit=3)
    names = [point["point"] for point in result["points"]]
    found = content(tmp_path / "sweep")
    assert {name for name in found if not name.startswith("fisher")} == {
        *("points", "sweep.json", "sweep.md", "sweep.png"),
        *(f"points/{name}.json" for name in names),
    }
    written = json.loads(found["sweep.json"] or b"")
    assert {key: written[key] for key in result} == result
    manifest = json.loads(found[f"points/{names[0]}.json"] or b"")
    assert manifest["recipe"]["parameters"]["theta"] == 0.05
    assert manifest["recipe"]["models"][0]["parameters"]["density"] == 0.1
    assert "removed once it was scored" in result["notes"][0]
    assert all(point["scores"]["problems"] == 3 for point in result["points"])


def test_the_merged_models_can_be_kept(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    result = sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.2]}, keep_merged=True)
    for point in result["points"]:
        assert streammerge.verify(tmp_path / "sweep" / "points" / point["point"])["ok"]
    assert result["notes"] == []
    sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.2]})
    assert not [path for path in (tmp_path / "sweep" / "points").iterdir() if path.is_dir()]
    assert calls.count("merge") == 2


class Stop(BaseException):
    """As a kill would: nothing behind it runs but what always does."""


@pytest.mark.parametrize("place", range(13))
def test_stopped_at_any_place_nothing_is_done_twice(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, place: int
) -> None:
    """Before the Fisher, and before each merge and each score, which is after the merge and after the last record."""

    def stop(call: str) -> None:
        if len(calls.log) == place:
            raise Stop(call)

    calls.before = stop
    with pytest.raises(Stop):
        sweep(recipe, tmp_path / "sweep")
    assert len(calls.log) == place
    calls.before = lambda call: None
    result = sweep(recipe, tmp_path / "sweep")
    assert len(calls.log) == len({*calls.log}) == 13
    assert len(result["points"]) == 6
    sweep(recipe, tmp_path / "sweep")
    assert len(calls.log) == 13, "a finished sweep does nothing"


def test_stopped_inside_of_a_merge_it_goes_on_there(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.checkpoints.writer import CheckpointWriter

    grid = {"density": [0.1, 0.4]}
    whole = sweep(recipe, tmp_path / "whole", grid)
    recipe["fisher_from"] = [str(tmp_path / "whole" / "fisher")]
    complete = CheckpointWriter.complete
    done: list[str] = []

    def counting(self: CheckpointWriter, name: str, *rest: Any) -> None:
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(name)
        complete(self, name, *rest)

    monkeypatch.setattr(CheckpointWriter, "complete", counting)
    total = 2 * len(tensors(Path(recipe["base"])))
    stop_at = total * 2 // 3  # in the second point
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "sweep", grid)
    stop_at = -1
    found = sweep(recipe, tmp_path / "sweep", grid)
    assert len(done) == total, "the tensors that were complete stay so"
    assert [point["scores"] for point in found["points"]] == [point["scores"] for point in whole["points"]]
    assert calls.count("fisher") == 1, "the second sweep reuses the first one's"


@pytest.mark.parametrize("half", [False, True])
def test_stopped_before_or_in_removing_a_merge(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Its score is kept by then; what is left of the merge goes with the next run."""
    remove = state.disk.remove_tree

    def stopping(folder: Path) -> None:
        if folder.parent.name != "points":
            return remove(folder)
        if half:
            folder.rename(folder.with_name(f"{folder.name}.removed"))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(state.disk, "remove_tree", stopping)
        with pytest.raises(Stop):
            sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.4]})
    assert (calls.count("merge"), calls.count("score")) == (1, 1)
    assert state.disk.remove_tree is remove
    sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.4]})
    assert (calls.count("merge"), calls.count("score")) == (2, 2)
    left = list((tmp_path / "sweep" / "points").iterdir())
    assert len(left) == 2 and all(path.suffix == ".json" for path in left)


KILLED = """
import json, os, signal, sys
import streammerge
from streammerge import mini_l2s
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.sweep import evaluations

recipe, out, log, at = json.loads(sys.argv[1])
complete = CheckpointWriter.complete

def counting(self, name, *rest):
    with open(log, "a") as file:
        print(self.folder.name, name, file=file)
    if len(open(log).readlines()) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    complete(self, name, *rest)

def score(folder, *, limit=None, progress=True):
    with open(log, "a") as file:
        print("score", folder.name, file=file)
    return {"accuracy": 0.5, "mean_length": 1.0}

CheckpointWriter.complete = counting
evaluations.EVALUATIONS["fixed"] = score
streammerge.sweep(recipe, {"density": [0.1, 0.4]}, out, evaluation="fixed", device="cpu", threads=1)
"""


def test_killed_in_the_second_point_it_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    """By SIGKILL; of the Fisher and the first point nothing is done again."""
    log, out = tmp_path / "log", tmp_path / "sweep"
    entire = len(tensors(Path(recipe["base"])))
    matrices = 14  # two blocks of seven: the Fisher's tensors
    at = matrices + entire + 1 + entire // 2  # the score of the first point is a line too
    for place in (at, -1):
        command = [sys.executable, "-c", KILLED, json.dumps([recipe, str(out), str(log), place])]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == (-signal.SIGKILL if place > 0 else 0), ended.stderr
    lines = log.read_text().splitlines()
    assert lines[:matrices] == [line for line in lines if line.startswith("fisher")]
    assert sum(line.startswith("score") for line in lines) == 2
    first = lines[matrices].split()[0]
    assert sum(line.startswith(first) for line in lines) == entire
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 2


def test_a_larger_grid_does_what_is_new(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    first = sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.4]})
    second = sweep(recipe, tmp_path / "sweep", {"density": [0.2, 0.1, 0.4]})
    assert (calls.count("fisher"), calls.count("merge")) == (1, 3)
    assert [point["scores"] for point in second["points"][1:]] == [point["scores"] for point in first["points"]]


def test_methods_that_need_no_fisher_and_those_that_need_more(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """One of the base for fim_ta, of all models for fisher_average, and none for linear."""
    methods = ["linear", "fim_ta", "fisher_average"]
    recipe |= {"fisher": {**recipe["fisher"], "all_parameters": True}}
    result = sweep(recipe, tmp_path / "sweep", {"method": methods})
    assert [call for call in calls.log if call.startswith("fisher")] == ["fisher fisher", "fisher fisher-1"]
    for number, method in enumerate(methods):
        values = {key: value for key, value in recipe.items() if key != "fisher" or method != "linear"}
        streammerge.merge({**values, "method": method}, tmp_path / method, device="cpu", threads=1)
        assert result["points"][number]["scores"] == {**calls.score(tmp_path / method)}


ABLATION = {
    "importance": "fim,norm,quadratic",
    "theta": "0.1,0.2,0.3",
    "density": "0.1,0.4,1.0",
    "trim": "magnitude,quadratic,none",
    "gate_factor": "1.0",
    "norm_tolerance": "off",
    "granularity": "tensor",
    "trim_scope": "block",
    "other": "mean",
    "method": "fim_ta",
}


def test_an_ablation_is_one_command(calls: Calls, recipe: dict[str, Any], tmp_path: Path, run: Run) -> None:
    """FIM-Merging, section 5.5, and every other choice of the method: each alone against the recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "parameters": {"density": 0.2}}))
    varied = [word for key, values in ABLATION.items() for word in ("--set", f"{key}={values}")]
    options = ("--eval", "changes", "--device", "cpu", "--threads", "1", "-q", "--json", "--one-by-one")
    result = run("sweep", path, *varied, *options, "--out", tmp_path / "sweep")
    assert result.code == 0, result.err
    points = json.loads(result.out)["points"]
    assert [[*point["settings"]] for point in points] == [
        [],
        *([key] for key, values in ABLATION.items() for _ in values.split(",")),
    ]
    assert (calls.count("fisher"), calls.count("merge")) == (1, len(points))
    manifests = [json.loads((tmp_path / f"sweep/points/{point['point']}.json").read_text()) for point in points]
    for point, manifest in zip(points, manifests, strict=True):
        made = {
            **manifest["recipe"]["models"][0]["parameters"],
            **manifest["recipe"]["parameters"],
            **manifest["recipe"],
        }
        assert all(made[key] == value for key, value in point["settings"].items())


ROWS = re.findall(r"^\| [^|]+ \| `(\w+=[^`]+)` \|$", (DOCS / "sweep.md").read_text("utf-8"), re.MULTILINE)


class Planned(BaseException):
    """All points are checked."""


def planned(grid: Mapping[str, list[Any]], out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[str]]:
    """The settings of the points that a sweep one by one of the mini pair would merge, and its notes."""
    found: list[Any] = []

    def stop(run: Any, base: Any) -> Any:
        found.append((run, [dict(checked.point.settings) for checked in check(run, base)]))
        raise Planned

    check = run_module.Run._check
    with monkeypatch.context() as patch, pytest.raises(Planned):
        patch.setattr(run_module.Run, "_check", stop)
        streammerge.sweep(evaluations.mini_pair(), grid, out, one_by_one=True)
    ((run, settings),) = found
    return settings, run.notes


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_documented_ablation_is_planned(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is the method's default is the recipe as it is; which one that is, the method's schema says."""
    assert len(ROWS) == 8
    ((key, values),) = parse_grid([row]).items()
    schemas = (METHODS[DEFAULT_METHOD].Parameters, METHODS[DEFAULT_METHOD].Expert)
    default = next((schema.model_fields[key].default for schema in schemas if key in schema.model_fields), None)
    same = [value for value in values if value == (0.2 if default == "auto" else default)]  # auto of a small model
    settings, notes = planned({key: values}, tmp_path, monkeypatch)
    assert settings == [{}, *({key: value} for value in values if value not in same)]
    assert notes == [f"{key} {value} is the recipe as it is, which stands for it" for value in same]


def test_a_folded_point_is_told(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    result = sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.2]}, one_by_one=True, keep_merged=True)
    assert [point["settings"] for point in result["points"]] == [{}, {"density": 0.1}]
    assert result["notes"] == ["density 0.2 is the recipe as it is, which stands for it"]
    assert (tmp_path / "sweep" / "sweep.md").read_text().endswith("which stands for it\n")


def test_going_on_is_told(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.4]}, progress=True)
    assert "done already" not in capsys.readouterr().err
    sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.3, 0.4]})
    assert capsys.readouterr().err == ""
    sweep(recipe, tmp_path / "sweep", {"density": [0.1, 0.3, 0.4, 0.5]}, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "3 of 4 points are done already" and "point 4 of 4: density 0.5" in lines


def test_what_it_prints(calls: Calls, recipe: dict[str, Any], tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "s"
    arguments = ("sweep", path, "--set", "density=0.1,0.4", "--eval", "changes", "--device", "cpu", "--out", out)
    result = run(*arguments)
    assert result.code == 0, result.err
    assert [line for line in result.err.splitlines() if line.startswith("point")] == [
        "point 1 of 2: density 0.1",
        "point 2 of 2: density 0.4",
    ]
    assert "Pareto front of accuracy and mean length, shortest first:\n#1: " in result.out
    assert result.out.splitlines()[0].split() == ["#", "density", "accuracy", "length", "truncated", "front"]
    told = json.loads(run(*arguments, "-q", "--json").out)
    assert told == {key: json.loads((out / "sweep.json").read_text())[key] for key in told}
    assert calls.count("merge") == 2


# --- what it refuses ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, list[Any]], str]] = {
    "no such key": ({}, {"densty": [0.1]}, "point densty 0.1: method fim_ties has no parameter 'densty': did you mean"),
    "a bad value late": ({}, {"density": [0.1, 2.0]}, "point density 2.0: .*must be between 0 and 1"),
    "no such method": ({}, {"method": ["tie"]}, "point method tie: .*did you mean 'ties'"),
    "of another method": (
        {},
        {"method": ["fim_ties", "ties"], "theta": [0.1]},
        "point method ties, theta 0.1: method ties",
    ),
    "two alike": ({}, {"density": ["auto", 0.2]}, "merge: density auto; and density 0.2: leave 0.2 out of density$"),
    "two alike of several keys": (
        {},
        {"density": [1, 1.0], "theta": [0.1]},
        "merge: density 1, theta 0.1; and density 1.0, theta 0.1: leave 1.0 out of density$",
    ),
    "useless texts": (
        {},
        {"calibration.samples": [4, 8]},
        "--set calibration.samples: no point of this sweep reads a calibration text: leave it out",
    ),
    "no such model": ({"models": ["/nowhere"]}, {"density": [0.1]}, "there is no such folder"),
    "a useless Fisher": ({}, {"method": ["linear"]}, "no point of this sweep reads a Fisher"),
}


@pytest.mark.parametrize(("values", "grid", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_measured(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, values: dict[str, Any], grid: Any, words: str
) -> None:
    with pytest.raises(streammerge.StreammergeError, match=words):
        sweep({**recipe, **values}, tmp_path / "sweep", grid)
    assert calls.log == [] and not (tmp_path / "sweep").exists()


def test_no_such_evaluation(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--eval mini_l2: there is no such evaluation: did you mean 'mini_l2s'"):
        streammerge.sweep(recipe, GRID, tmp_path / "sweep", evaluation="mini_l2")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"parameters": {"theta": 0.3}}, {}, r"recipe.parameters.theta \(none -> 0.3\)"),
        ({"fisher": {"samples": 3, "length": 16}}, {}, r"recipe.fisher.samples \(2 -> 3\)"),
        ({}, {"limit": 5}, r"limit \(none -> 5\)"),
    ],
)
def test_another_sweep_in_the_same_folder(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    sweep(recipe, tmp_path / "sweep", {"density": [0.1]})
    before = content(tmp_path / "sweep")
    with pytest.raises(OutputExistsError, match=f"holds a sweep that differs in {words}: repeat that one, or choose"):
        sweep({**recipe, **change}, tmp_path / "sweep", {"density": [0.1]}, **options)
    assert content(tmp_path / "sweep") == before and calls.count("merge") == 1


def test_another_base_in_the_same_folder(calls: Calls, recipe: dict[str, Any], models: Models, tmp_path: Path) -> None:
    sweep(recipe, tmp_path / "sweep", {"density": [0.1]})
    spoil(models.base, MATRIX, 0.5)
    with pytest.raises(OutputExistsError, match=r"differs in base .*(its tensors have changed|was written to since)"):
        sweep(recipe, tmp_path / "sweep", {"density": [0.1]})
    assert calls.count("merge") == 1


def test_a_folder_of_something_else(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not empty"):
        sweep(recipe, out)
    (out / "notes.txt").unlink()
    for text in ("{", "[]", "{}", '{"identity": {}, "done": {"a": {}}}'):
        (out / "sweep.json").write_text(text)
        with pytest.raises(OutputExistsError, match="damaged, or of no sweep"):
            sweep(recipe, out)
    assert calls.log == []


def test_two_at_once(calls: Calls, recipe: dict[str, Any], tmp_path: Path) -> None:
    def second(call: str) -> None:
        calls.before = lambda call: None
        with pytest.raises(OutputExistsError, match=f"another sweep in {tmp_path / 'sweep'} is at work"):
            sweep(recipe, tmp_path / "sweep")

    calls.before = second
    assert len(sweep(recipe, tmp_path / "sweep")["points"]) == 6


@pytest.mark.parametrize("value", [float("nan"), None, "0.5"])
def test_a_score_that_is_no_number(
    calls: Calls, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    def score(folder: Path, **options: Any) -> dict[str, Any]:
        return {"accuracy": 0.5, "mean_length": value}

    monkeypatch.setitem(evaluations.EVALUATIONS, "changes", score)
    with pytest.raises(streammerge.errors.CheckpointError, match="gives mean_length .*, which is no number"):
        sweep(recipe, tmp_path / "sweep")
    assert json.loads((tmp_path / "sweep" / state.SWEEP_FILE).read_text())["done"] == {}


def test_the_mini_evaluation_is_the_packages() -> None:
    """Under the name as users may write it; against the pair's own scores of a few problems."""
    base, long = mini_l2s.pair()
    score = evaluations.find_evaluation("mini-l2s")
    found, own = score(base, limit=3, progress=False), mini_l2s.score(base, limit=3, progress=False)
    assert {**found, "seconds": 0} == {**own, "seconds": 0}
    assert evaluations.mini_pair() == {"base": str(base), "models": [str(long)]}
