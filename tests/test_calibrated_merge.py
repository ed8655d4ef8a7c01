"""Merges that look at a text, through the command line, against whole live models and the methods' formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.conftest import Family
from calibration.test_measure import inputs_of, naive_information, outputs_of
from methods.test_regmean import naive as naive_regmean
from tiny_models import Run, content, tensors
from torch import Tensor, nn

from streammerge.calibration.lockstep import Lockstep
from streammerge.unit_work import Merge

Make = Callable[..., Family]
pytest_plugins = ["calibration.conftest"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def command(made: Family, method: str, out: Path, *options: object, experts: int = 1) -> tuple[str, ...]:
    base, *tuned = made.folders
    models = [word for folder in tuned[:experts] for word in ("--ft", folder)]
    text = ("--calibration", made.settings.text[0], "--calibration-samples", 5, "--calibration-length", 12)
    words = ("--base", base, *models, "--method", method, *text, *options, "--out", out, "-q")
    return tuple(str(word) for word in words)


def weights(made: Family, number: int) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors(made.folders[number]).items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(), tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_acm_ta(family: Make, tmp_path: Path, run: Run) -> None:
    made = family("llama", False)
    assert run(*command(made, "acm_ta", tmp_path / "out", experts=2)).code == 0
    base, found = weights(made, 0), tensors(tmp_path / "out")
    outputs = [outputs_of(model, made.ids) for model in made.models]

    def coefficient(expert: int, place: str) -> float:
        pairs = zip(outputs[0][place], outputs[expert][place], strict=True)
        nats = torch.tensor([naive_information(a, b) for a, b in pairs], dtype=torch.float64)
        return 1 - torch.sigmoid(0.7 * (nats - nats.max())).mean().item()

    expected = dict(base)
    for expert in (1, 2):
        tuned = weights(made, expert)
        for name in base:
            block = f"model.layers.{name.split('.')[2]}.mlp.down_proj" if ".layers." in name else None
            place = block or {"lm_head.weight": "lm_head", "model.norm.weight": "model.norm"}.get(name, "first")
            expected[name] = expected[name] + coefficient(expert, place) * (tuned[name] - base[name])
    close(found, expected, 2e-3)  # labels in bfloat16 may round to a neighbour
    assert run("verify", tmp_path / "out", "-q").code == 0


def test_regmean(family: Make, tmp_path: Path, run: Run) -> None:
    made = family("llama", False)
    assert run(*command(made, "regmean", tmp_path / "out", "--calibration-rows", 1000, experts=2)).code == 0
    states = [weights(made, number) for number in range(3)]
    seen = [inputs_of(model, made.ids, lambda m: isinstance(m, nn.Linear)) for model in made.models]
    expected = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    for name in seen[0]:
        inputs = [of_model[name].flatten(0, -2) for of_model in seen]
        expected[f"{name}.weight"] = naive_regmean([s[f"{name}.weight"] for s in states], inputs, [1, 1, 1], 0.9)
    close(tensors(tmp_path / "out"), expected, 1e-4)


def test_aim_after_another_method(family: Make, tmp_path: Path, run: Run) -> None:
    made = family("qwen2", True)
    assert run(*command(made, "task_arithmetic", tmp_path / "out", "--aim", 0.4, "--coefficient", 1)).code == 0
    base, tuned = weights(made, 0), weights(made, 1)
    seen = inputs_of(made.models[0], made.ids, lambda m: hasattr(m, "weight") and not isinstance(m, nn.Embedding))
    expected = dict(tuned)
    for module, x in seen.items():
        name = f"{module}.weight"
        if name in base:  # the head is tied
            magnitudes = x.double().abs().flatten(0, -2).mean(0)
            left = 1 - 0.6 * magnitudes / magnitudes.max()
            expected[name] = base[name] + (tuned[name] - base[name]) * left
    close(tensors(tmp_path / "out"), expected, 1e-5)
    manifest = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert manifest["recipe"]["aim"] == 0.4
    assert "aim" in manifest["tensors"]["model.norm.weight"]


@pytest.mark.parametrize("method", ["acm_ta", "regmean"])
def test_the_bytes_do_not_depend_on_memory_or_threads(family: Make, tmp_path: Path, run: Run, method: str) -> None:
    made = family("mixtral")
    for number, options in enumerate([(), ("--threads", 1), ("--threads", 3, "--max-ram", "16MiB")]):
        assert run(*command(made, method, tmp_path / f"out{number}", *options, experts=2)).code == 0
    shards = [content(tmp_path / f"out{number}")["model.safetensors"] for number in range(3)]
    assert shards[0] == shards[1] == shards[2]


@pytest.fixture
def stopped(family: Make, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A merge that stops at the n-th call of a function, as by Ctrl-C."""

    def stop(made: Family, owner: type, name: str, call: int) -> Path:
        plain, calls, out = getattr(owner, name), [], tmp_path / f"stopped-{name}"

        def stopping(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping)
            assert run(*command(made, "regmean", out)).code == 130
        assert [path.name for path in out.iterdir()] == [".streammerge"]
        return out

    return stop


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"), [(Merge, "do", 9, True), (Lockstep, "_through", 3, False)]
)
def test_interrupted(
    family: Make, tmp_path: Path, run: Run, stopped: Any, owner: type, name: str, call: int, finished: bool
) -> None:
    """In the merge: the calibration is not measured again. Within it: it is. The bytes are the same."""
    made = family("llama")
    assert run(*command(made, "regmean", tmp_path / "whole")).code == 0
    out = stopped(made, owner, name, call)
    assert (out / ".streammerge" / "calibration" / "calibration.json").exists() is finished
    with pytest.MonkeyPatch.context() as patch:
        if finished:
            patch.delattr(Lockstep, "run")
        resumed = run(*command(made, "regmean", out))
    assert resumed.code == 0, resumed.err
    assert content(out) == content(tmp_path / "whole")


def test_another_text_does_not_finish_it(family: Make, run: Run, stopped: Any) -> None:
    made = family("llama")
    out = stopped(made, Merge, "do", 9)
    text = Path(made.settings.text[0])
    text.write_text(text.read_text()[::-1])
    refused = run(*command(made, "regmean", out))
    assert refused.code == 1
    assert "unfinished run that differs in texts" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "regmean"), "method regmean needs a calibration text: give --calibration FILE"),
        (("-m", "ties", "--aim", "0.4"), "method ties with --aim needs a calibration text"),
        (("-m", "ties", "--calibration", "x"), "method ties with these parameters uses no calibration text"),
        (("-m", "regmean", "--calibration", "missing"), "--calibration missing: No such file"),
        (("-m", "regmean", "--calibration", "x", "--calibration-samples", "0"), "calibration.samples"),
        (("-m", "regmean", "--calibration", "x", "--calibration", "y"), "2 calibration texts for 2 models"),
        (("-m", "acm_ta", "--calibration", "x", "--calibration", "y"), "2 calibration texts for 2 models: give one"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "merge"])
def test_refused(family: Make, tmp_path: Path, run: Run, verb: str, options: Any, message: str) -> None:
    made = family()
    out = ("--out", tmp_path / "out") if verb == "merge" else ()
    result = run(verb, "--base", made.folders[0], "--ft", made.folders[1], *options, *out)
    if message == "2 calibration texts for 2 models":
        message = "--calibration x: No such file"  # one each is fine for regmean
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plan_says_what_it_takes(family: Make, run: Run) -> None:
    made = family()
    words = list(command(made, "acm_ta", Path("unused"))[:-3])
    shown = run("plan", *words)
    assert shown.code == 0, shown.err
    assert "mutual information on 60 tokens per text" in shown.out
    assert "for the calibration" in shown.out
    summary = json.loads(run("plan", *words, "--json").out)
    assert summary["calibration"]["measurements"] == ["mutual_information"]
    assert summary["peak_host_bytes"] >= summary["calibration"]["host_bytes"]
