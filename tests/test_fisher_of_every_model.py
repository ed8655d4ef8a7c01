"""Merges that need a Fisher of every model, end to end: measured, given, interrupted, refused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from naive import naive_fisher
from tiny_models import WEIGHTS, Models, Run, content, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.cli import main
from streammerge.fisher.walk import Walk

merging = import_module("streammerge.merge")  # the package's attribute of that name is the function

SETTINGS = ("--fisher-samples", "2", "--fisher-length", "12", "--fisher-dtype", "float32")
METHOD = ("-m", "fisher_average", "--device", "cpu", "-q", *SETTINGS)


@pytest.fixture(scope="module")
def fishers(saved_models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The Fisher of each model, the base's first. No test may change them."""
    folder = tmp_path_factory.mktemp("fishers")
    found = [folder / model.name for model in saved_models]
    for model, out in zip(saved_models, found, strict=True):
        assert main(["fisher", "--base", str(model), "--out", str(out), "--device", "cpu", "-q", *SETTINGS]) == 0
    return found


def trio(models: Models, out: Path) -> tuple[object, ...]:
    return ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "--out", out, *METHOD)


def given(fishers: Sequence[Path]) -> list[object]:
    return [word for fisher in fishers for word in ("--fisher", fisher)]


def test_measured_or_given_the_bytes_are_the_same(
    saved_models: Models, fishers: list[Path], tmp_path: Path, run: Run
) -> None:
    assert run(*trio(saved_models, tmp_path / "measured")).code == 0
    assert run(*trio(saved_models, tmp_path / "given"), *given(fishers)).code == 0
    recipe = tmp_path / "recipe.yaml"
    values = {
        "base": str(saved_models.base),
        "models": [str(saved_models.ft), str(saved_models.ft2)],
        "method": "fisher_average",
        "fisher": {"samples": 2, "length": 12},
        "fisher_from": [str(fisher) for fisher in fishers],
    }
    recipe.write_text(yaml.safe_dump(values))
    assert run(recipe, "--out", tmp_path / "recipe", "-q").code == 0
    measured = (tmp_path / "measured" / WEIGHTS).read_bytes()
    assert (tmp_path / "given" / WEIGHTS).read_bytes() == measured
    assert (tmp_path / "recipe" / WEIGHTS).read_bytes() == measured
    roles = {
        name: [source["role"] for source in json.loads((tmp_path / name / "streammerge.json").read_text())["sources"]]
        for name in ("measured", "given")
    }
    assert roles["measured"] == ["base", "expert", "expert"]
    assert roles["given"] == [*roles["measured"], "fisher", "fisher", "fisher"]


def test_it_is_the_average_of_the_paper(saved_models: Models, tmp_path: Path) -> None:
    """The whole models in memory, their Fishers by ordinary autograd, the average in float64."""
    recipe = {
        "base": str(saved_models.base),
        "models": [str(saved_models.ft), str(saved_models.ft2)],
        "method": "fisher_average",
        "parameters": {"coefficient": [0.5, 2.0], "fisher_floor": 1e-3},
        "fisher": {"samples": 2, "length": 12, "dtype": "float32"},
    }
    streammerge.merge(recipe, tmp_path / "out", device="cpu")
    states = [tensors(folder) for folder in saved_models]
    fishers: list[dict[str, Tensor]] = []
    for folder in saved_models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        fisher, _ = naive_fisher(model, 2, 12)
        fishers.append({n: f.double() for n, f in fisher.items() if ".layers." in n and f.dim() > 1})
    norms = [float(torch.cat([f.flatten() for f in fisher.values()]).norm()) for fisher in fishers]
    assert max(norms) / min(norms) > 1.05  # so that the division can be seen
    coefficients, changed = [1.0, 0.5, 2.0], 0
    for name, found in tensors(tmp_path / "out").items():
        values = [state[name].double() for state in states]
        weights = [torch.tensor(c, dtype=torch.float64) for c in coefficients]
        if name in fishers[0]:
            raised = fishers[0][name].clamp(min=1e-3)
            changed += int((raised != fishers[0][name]).sum())
            of_models = [raised, *(fisher[name] for fisher in fishers[1:])]
            weights = [c * f / norm for c, f, norm in zip(coefficients, of_models, norms, strict=True)]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert changed


def refused(run: Run, out: Path, arguments: Sequence[object]) -> str:
    result = run(*arguments)
    assert result.code == 1 and not out.exists(), result
    first, *others = result.err.splitlines()
    assert first.startswith("streammerge: error: ") and all(line.startswith("  - ") for line in others)
    return result.err


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_fisher_for_each_model_or_none(
    saved_models: Models, fishers: list[Path], tmp_path: Path, run: Run, count: int
) -> None:
    some = given([*fishers, fishers[0]][:count])
    message = refused(run, tmp_path / "out", (*trio(saved_models, tmp_path / "out"), *some))
    assert message.count("\n") == 1
    assert f"method fisher_average with these models takes 3 Fisher(s), {count} given" in message
    assert "--fisher once for the base and once for each fine-tuned model, in order" in message


def test_one_fisher_for_a_method_that_needs_the_base_s_alone(
    saved_models: Models, fishers: list[Path], tmp_path: Path, run: Run
) -> None:
    command = (*trio(saved_models, tmp_path / "out"), "-m", "fim_ties", *given(fishers))
    message = refused(run, tmp_path / "out", command)
    assert "method fim_ties with these models takes 1 Fisher(s), 3 given: --fisher once for the base model" in message


def test_a_fisher_of_another_model(saved_models: Models, fishers: list[Path], tmp_path: Path, run: Run) -> None:
    turned = [fishers[0], fishers[2], fishers[1]]
    message = refused(run, tmp_path / "out", (*trio(saved_models, tmp_path / "out"), *given(turned)))
    assert f"it was made from {saved_models.ft2}, whose content differs from {saved_models.ft}" in message


def test_a_fisher_of_other_settings(saved_models: Models, fishers: list[Path], tmp_path: Path, run: Run) -> None:
    command = (*trio(saved_models, tmp_path / "out"), *given(fishers), "--fisher-samples", "1")
    assert f"Fisher {fishers[0]} does not fit" in refused(run, tmp_path / "out", command)


def test_one_folder_cannot_keep_them_all(saved_models: Models, tmp_path: Path, run: Run) -> None:
    command = (*trio(saved_models, tmp_path / "out"), "--save-fisher", tmp_path / "kept")
    assert "make each with `streammerge fisher`" in refused(run, tmp_path / "out", command)
    assert not (tmp_path / "kept").exists()


class StopError(BaseException):
    """Stands for a crash."""


@dataclass
class Log:
    """The models whose Fisher is begun, and whose head is behind, in order; a crash at one of these."""

    steps: list[str] = field(default_factory=list)
    stop: str = ""

    def note(self, step: str) -> None:
        self.steps.append(step)
        if step == self.stop:
            raise StopError


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    measure, head = merging._measure, Walk._head

    def begin(job: Any, model: Any, *rest: Any) -> None:
        log.note(f"begin {model.folder.name}")
        measure(job, model, *rest)

    def walk(self: Walk, *rest: Any) -> None:
        head(self, *rest)
        log.note(f"head {self.model.base.folder.name}")

    monkeypatch.setattr(merging, "_measure", begin)
    monkeypatch.setattr(Walk, "_head", walk)
    return log


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("begin ft2", ["begin ft2", "head ft2"]),  # between the second and the third
        ("head ft2", ["begin ft2"]),  # half-way through the third: its way forward is behind
        ("head ft", ["begin ft", "begin ft2", "head ft2"]),
    ],
)
def test_interrupted_it_goes_on(
    saved_models: Models, tmp_path: Path, run: Run, log: Log, stop: str, left: list[str]
) -> None:
    assert run(*trio(saved_models, tmp_path / "whole")).code == 0
    assert log.steps == ["begin base", "head base", "begin ft", "head ft", "begin ft2", "head ft2"]
    log.stop = stop
    with pytest.raises(StopError):
        run(*trio(saved_models, tmp_path / "out"))
    assert not (tmp_path / "out" / WEIGHTS).exists()
    log.stop, log.steps = "", []
    assert run(*trio(saved_models, tmp_path / "out")).code == 0
    assert log.steps == left
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_plan_tells(saved_models: Models, fishers: list[Path], run: Run) -> None:
    pair = ("--base", saved_models.base, "--ft", saved_models.ft, "--ft", saved_models.ft2, *SETTINGS)

    def told(*options: object) -> dict[str, Any]:
        return json.loads(run("plan", *pair, *options, "--json").out)

    average, reused = told("-m", "fisher_average"), told("-m", "fisher_average", *given(fishers))
    once = told("-m", "fim_ties")
    assert average["fisher"] == "measured on random tokens, of every model"
    assert reused["fisher"] == ", ".join(str(fisher) for fisher in fishers)
    assert average["fisher_bytes_to_read"] == 3 * once["fisher_bytes_to_read"] > 0 == reused["fisher_bytes_to_read"]
    assert average["fisher_placement"] and reused["fisher_placement"] is None
    # the survey and the merge read the blocks' matrices of three models and their Fishers, the merge the rest too
    sizes = {name: value.nbytes for name, value in tensors(saved_models.base).items()}
    matrices = sum(value.nbytes for name, value in tensors(fishers[0]).items())
    assert average["bytes_to_read"] == reused["bytes_to_read"] == 3 * sum(sizes.values()) + 3 * matrices + 6 * matrices
    without = told("-m", "fisher_average", "--normalize-fishers", "false")
    assert without["bytes_to_read"] == 3 * sum(sizes.values()) + 3 * matrices
    text = run("plan", *pair, "-m", "fisher_average").out
    assert "Fisher         measured on random tokens, of every model\n" in text
    assert " for the Fisher\n" in text and "\nFisher pass    on " in text
