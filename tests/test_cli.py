"""The command line: help, exit statuses, what goes to which stream, and the contract of `--json`."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import typer
import yaml
from methods.driver import resolve
from tiny_models import (
    HEAD,
    MATRIX,
    WEIGHTS,
    Models,
    Run,
    content,
    edit_config,
    give_tokenizer,
    put,
    spoil,
    tensors,
    write_text,
)

import streammerge
from streammerge import cli
from streammerge.methods import METHODS

NUMBERS = {
    "eval": {
        "--limit": "int",
        "--samples": "int",
        "--temperature": "float",
        "--seed": "int",
        "--max-new-tokens": "int",
    },
    "merge": {"--calibration-samples": "int", "--fisher-seed": "int", "--fisher-length": "int"},
    "fisher": {"--samples": "int", "--seed": "int"},
    "diagnose": {"--samples": "int", "--alpha": "float"},
}
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands
Merged = Callable[..., Path]


# --- help and usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_option_with_a_text(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, flag: str) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    result = run(name, flag)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    for parameter in COMMANDS[name].params:
        option = parameter.opts[0]
        assert parameter.help, option
        assert parameter.help.rstrip().endswith((".", ")")), parameter.help
        start = parameter.help.replace("\\[", "[")[:30]
        assert [line for line in lines if option in line and start in line], option
    assert COMMANDS[name].help


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_shows_which_values_are_taken(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """None by a flag, a number by what is one."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    shown = run(*([name] if name else []), "--help").out
    assert "--help" in shown and "<bool>" not in shown
    for option, kind in NUMBERS.get(name, {}).items():
        assert re.search(rf"{option}(,--[a-z-]+)? +<{kind}> ", shown), option


NEW = {
    "merge": ["--device", "--max-vram", "--device-map", "--trust-remote-code", "--fisher-probe-text", "--save-fisher"],
    "plan": ["--device", "--max-vram", "--device-map", "--trust-remote-code", "--fisher-probe-text"],
    "fisher": ["--device", "--max-vram", "--device-map", "--trust-remote-code", "--fisher-probe-text", "--probe-text"],
}


@pytest.mark.parametrize("name", NEW)
def test_help_lists_the_options_of_a_fisher_pass_once(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    words = re.split(r"[\s,]+", run(name, "--help").out)
    assert {option: words.count(option) for option in NEW[name]} == dict.fromkeys(NEW[name], 1)


@pytest.mark.parametrize("prefix", ["", "fisher-"])
def test_the_fisher_command_takes_its_settings_by_both_names(
    models: Models, tmp_path: Path, run: Run, prefix: str
) -> None:
    give_tokenizer(models.base)
    (tmp_path / "text").write_text("the cat sat on the mat and the rat sat on the cat ")
    options = {"samples": "3", "length": "8", "seed": "7", "dtype": "float32", "probe-text": str(tmp_path / "text")}
    given = [word for key, value in options.items() for word in (f"--{prefix}{key}", value)]
    result = run("fisher", "--base", models.base, "--out", tmp_path / "f", "--json", *given)
    assert (result.code, result.err) == (0, "")
    settings = json.loads(result.out)["settings"]
    assert {key: str(settings[key.replace("-", "_")]) for key in options} == options


def test_the_help_of_the_whole(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert all(name in result.out for name in ("merge", "plan", "fisher", "verify", "methods", "demo", "--version"))
    assert run() == result
    assert run("-h") == result


def test_every_method_and_every_parameter_is_an_option() -> None:
    options = {option for parameter in COMMANDS["merge"].params for option in parameter.opts}
    schemas = [schema for method in METHODS.values() for schema in (method.Parameters, method.Expert)]
    assert options >= {f"--{key.replace('_', '-')}" for schema in schemas for key in schema.model_fields}
    (method,) = (parameter for parameter in COMMANDS["merge"].params if parameter.name == "method")
    assert all(name in method.help for name in METHODS)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"streammerge {streammerge.__version__}\n", "")


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "no base": (("merge", "--ft", "a", "--out", "o"), "--base"),
    "no fine-tune": (("--base", "a", "--out", "o"), "--ft"),
    "no output": (("--base", "{base}", "--ft", "{ft}"), "--out"),
    "two bases": (("--base", "a", "--hub-base", "a/b", "--ft", "c", "--out", "o"), "--hub-base"),
    "fisher without base": (("fisher", "--out", "o"), "--base"),
    "fisher without output": (("fisher", "--base", "a"), "--out"),
    "no such option": (("--base", "a", "--methode", "ties"), "--methode"),
    "no value": (("--base",), "--base"),
    "no threads": (("--base", "a", "--ft", "b", "--threads", "0"), "--threads"),
    "verify without folder": (("verify",), "folder"),
}


@pytest.mark.parametrize(("arguments", "word"), USAGE.values(), ids=USAGE)
def test_usage_errors_exit_with_2(
    run: Run,
    saved_models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(**saved_models._asdict()) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    assert word in result.err and "Error" in result.err
    assert not content(tmp_path)


def test_an_unknown_option_comes_with_a_suggestion(run: Run) -> None:
    assert "--method" in run("--base", "a", "--methode", "ties").err


# --- what a merge prints ------------------------------------------------------------------------------------------


def test_without_a_command_merge_is_meant(models: Models, tmp_path: Path, run: Run) -> None:
    arguments = ("--base", models.base, "--ft", models.ft, "-m", "ties", "-q", "--out")
    assert run(*arguments, tmp_path / "a").code == run("merge", *arguments, tmp_path / "b").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("name", ["fim-ties", "fim_ties", "task-arithmetic", "task_arithmetic"])
def test_hyphens_and_underscores(models: Models, run: Run, name: str) -> None:
    result = run("plan", "--base", models.base, "--ft", models.ft, "--method", name, "--json")
    assert json.loads(result.out)["method"] == name.replace("-", "_")


def test_standard_output_has_the_result_and_standard_error_nothing(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    result = run(*pair, "--out", tmp_path / "out", "--fisher", saved_fisher)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0].split() == ["block", "Fisher", "mean", "task", "vector^2", "score", "alpha", "kept", "rescaled"]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[-1].startswith("24 tensors merged, 2 copied from the base: ")
    assert lines[-1].endswith(f" in {tmp_path / 'out'}")
    result = run("verify", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path / 'out'}: ok: 26 tensors, ")
    result = run("fisher", "--base", models.base, "--out", tmp_path / "f", "--fisher-samples", "1")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"Fisher of {models.base} in {tmp_path / 'f'}"


def test_notes_are_part_of_the_result(models: Models, tmp_path: Path, run: Run) -> None:
    put(models.ft, HEAD, torch.ones(48, 16))
    result = run("--base", models.base, "--ft", models.ft, "-m", "ties", "--out", tmp_path / "out")
    assert f"note: {models.ft}: tensor '{HEAD}' was left out: the base ties its head" in result.out
    assert "was left out" in (tmp_path / "out" / "README.md").read_text()


def test_dry_run_is_plan_and_writes_nothing(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.commands.merge.available_memory", lambda: 1 << 33)
    monkeypatch.setattr("streammerge.checkpoints.disk_space.free_bytes", lambda folder: 1 << 33)
    pair = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "--threads", "1")
    before = content(tmp_path)
    for more in ((), ("--json",), ("--out", tmp_path / "out")):
        planned = run("plan", *pair, *more)
        assert (planned.code, planned.err) == (0, "")
        assert run(*pair, "--dry-run", *more) == planned
        assert run("merge", *pair, "--dry-run", *more) == planned
    assert content(tmp_path) == before


def test_what_plan_tells(models: Models, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    summary = json.loads(run("plan", *pair, "--json", "--density", "0.5").out)
    assert summary["base"] == str(models.base)
    assert summary["models"] == [{"model": str(models.ft), "coefficient": 1.0, "density": 0.5}]
    assert (summary["tensors"], summary["merged"], summary["copied"]) == (26, 24, 2)
    assert summary["parameters"] == sum(value.numel() for value in tensors(models.base).values())
    assert summary["bytes_to_write"] == (models.base / WEIGHTS).stat().st_size
    assert summary["bytes_to_read"] > 0 and summary["fisher_bytes_to_read"] > 0
    assert summary["passes"] >= 3
    assert summary["peak_host_bytes"] >= summary["peak_merge_bytes"] > 0 < summary["fisher_placement"]["host_bytes"]
    text = run("plan", *pair).out
    words = ("tensors", "parameters", "to read", "to write", "passes", "host memory", "Fisher pass")
    assert [word for word in words if f"\n{word} " not in text] == []
    copies = json.loads(run("plan", *pair, "--json", "-m", "task_arithmetic").out)
    assert (copies["fisher_placement"], copies["fisher"], copies["fisher_bytes_to_read"]) == (None, "none", 0)


def test_plan_tells_of_an_unfinished_run(models: Models, tmp_path: Path, run: Run) -> None:
    (tmp_path / "out" / ".streammerge").mkdir(parents=True)
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--out", tmp_path / "out")
    assert "holds an unfinished run: the same merge goes on where it stopped" in run(*pair).out
    assert "holds an unfinished run: --overwrite starts it anew" in run(*pair, "--overwrite").out


def test_plan_tells_where_the_fisher_pass_runs(models: Models, tmp_path: Path, run: Run) -> None:
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--device", "cpu")
    line = r"\nFisher pass    on cpu, {} of 2 blocks stay, {} are read twice; \d{{3}} MiB of RAM\n"
    assert re.search(line.format(0, 2), run(*pair).out)
    (tmp_path / "map.json").write_text(json.dumps({"model": "disk", "model.layers.0": "cpu"}))
    result = run(*pair, "--device-map", tmp_path / "map.json")
    assert re.search(line.format(1, 1), result.out), result
    assert "Fisher pass" not in run(*pair, "-m", "ties").out


def test_the_blocks_that_stay_change_nothing(models: Models, tmp_path: Path, run: Run) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"": "disk", "model.layers.0": "cpu"}))
    fisher = ("fisher", "--base", models.base, "--samples", "1", "--device", "cpu", "-q", "--out")
    assert run(*fisher, tmp_path / "a").code == 0
    assert run(*fisher, tmp_path / "b", "--device-map", tmp_path / "map.json").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_merge_json_is_the_manifest(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft)
    result = run(*pair, "--out", tmp_path / "out", "--fisher", saved_fisher, "--max-shard-size", "8KB", "--json")
    manifest = json.loads(result.out)
    assert manifest == json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert manifest["version"] == streammerge.__version__
    assert manifest["recipe"]["parameters"]["gate_factor"] == 0.7
    assert manifest["recipe"]["models"] == [
        {"model": str(models.ft), "parameters": {"coefficient": 1.0, "density": 0.2}}
    ]
    assert [source["role"] for source in manifest["sources"]] == ["base", "expert", "fisher"]
    assert all({"role", "id", "revision"} <= source.keys() for source in manifest["sources"])
    keys = {"block", "fisher_mean", "task_vector_mean_square", "score", "alpha"}
    assert [block["block"] for block in manifest["blocks"]] == [0, 1]
    assert all(block.keys() == keys for block in manifest["blocks"])
    assert manifest["tensors"].keys() == tensors(models.base).keys()
    assert {"coefficient", "kept", "numel", "norm_ratio", "rescaled"} <= manifest["tensors"][MATRIX].keys()
    assert all(entry["numel"] > 0 for entry in manifest["tensors"].values())
    assert len(manifest["shards"]) > 1
    for file, entry in manifest["shards"].items():
        assert entry.keys() == {"bytes", "sha256"}
        assert entry["bytes"] == (tmp_path / "out" / file).stat().st_size
        assert len(entry["sha256"]) == 64


def test_verify_json(merged: Merged, run: Run) -> None:
    out = merged()
    result = run("verify", out, "--json")
    report = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    size = sum(value.nbytes for value in tensors(out).values())
    assert report == {"ok": True, "problems": [], "tensors": 26, "bytes": size, "nonfinite": [], "notes": []}
    (out / "LICENSE").unlink()
    result = run("verify", out, "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"], report["problems"]) == (1, False, ["file LICENSE is missing"])
    assert run("verify", out).out == f"{out}: file LICENSE is missing\n"


def test_fisher_json(models: Models, tmp_path: Path, run: Run) -> None:
    result = run("fisher", "--base", models.base, "--out", tmp_path / "f", "--fisher-samples", "1", "--json")
    record = json.loads(result.out)
    assert record == json.loads((tmp_path / "f" / "fisher.json").read_text())
    assert record["base"]["id"] == str(models.base) and record["settings"]["samples"] == 1
    assert [block["block"] for block in record["blocks"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mrege", "--base", "a"), "there is no command 'mrege': did you mean 'merge'?"),
        (("evl", "merged"), "there is no command 'evl': did you mean 'eval'?"),
        (("xyz",), f"there is no command 'xyz': known: {', '.join(COMMANDS)}"),
        (("recipe.yaml",), "recipe recipe.yaml: No such file or directory"),
        (("mine/recipe",), "recipe mine/recipe: No such file or directory"),
    ],
)
def test_a_word_that_is_no_command(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """Nor a file, which would be a recipe."""
    monkeypatch.chdir(tmp_path)
    is_command = message.startswith("there is no")
    assert run(*arguments) == (2 if is_command else 1, "", f"streammerge: error: {message}\n")


def test_a_recipe_may_have_the_name_of_no_command(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrege").write_text("base: nowhere\n")
    result = run("mrege", "--out", "out")
    assert result.code == 1 and "no command" not in result.err and "models" in result.err


# --- recipes ------------------------------------------------------------------------------------------------------


def test_options_go_before_the_recipe_file(models: Models, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {
        "base": "nowhere",
        "models": [{"model": str(models.ft), "parameters": {"coefficient": 0.5}}],
        "method": "fim_ties",
        "parameters": {"theta": 2, "gate_factor": 0.9},
        "fisher": {"samples": 2, "length": 16},
        "max_shard_bytes": "10KB",
    }
    recipe.write_text(yaml.safe_dump(values))
    options = ("--base", models.base, "--theta", "3", "--fisher-samples", "1", "--max-shard-size", "1GB", "-q")
    result = run(recipe, *options, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)["recipe"]
    assert (told["base"], told["models"][0]["model"]) == (str(models.base), str(models.ft))
    assert told["models"][0]["parameters"]["coefficient"] == 0.5
    assert (told["parameters"]["theta"], told["parameters"]["gate_factor"]) == (3, 0.9)
    assert (told["fisher"]["samples"], told["fisher"]["length"]) == (1, 16)
    assert told["max_shard_bytes"] == 10**9
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_one_value_for_all_models_or_one_each(models: Models, run: Run) -> None:
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--ft", models.ft2, "-m", "ties", "--json")
    plans = [json.loads(run(*pair, "--density", "0.5", *more).out) for more in ((), ("--density", "0.25"))]
    assert [[model["density"] for model in plan["models"]] for plan in plans] == [[0.5, 0.5], [0.5, 0.25]]


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_in_the_card_can_be_run_again(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, method: str
) -> None:
    experts = (models.ft, models.ft2)[: METHODS[method].most_experts]
    needs = resolve(method, len(experts)).method
    fisher = ("--fisher", saved_fisher) if needs.needs_fisher and not needs.fisher_of_experts else ()
    text = write_text(models, tmp_path) if needs.calibration else ()
    weighs = "coefficient" in METHODS[method].Expert.model_fields
    coefficients = [("--coefficient", value) for value in ("0.6", "0.3")[: len(experts)] if weighs]
    options = ("-m", method, *(word for pair in coefficients for word in pair), "--max-shard-size", "8KB", "-q")
    given = ("--base", models.base, *(word for expert in experts for word in ("--ft", expert)))
    assert run(*given, *options, *fisher, *text, "--out", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "run `streammerge merge recipe.yaml --out merged`; replace the names of local folders by your own" in card
    own = {Path(path).name: str(path) for path in (models.base, *experts, *fisher[1:], *text[1:])}
    recipe = tmp_path / "recipe.yaml"
    words = re.split(r"((?<!other:)(?<!trim:)\s)", card.split("```yaml\n")[1].split("```")[0])
    recipe.write_text("".join(own.get(word, word) for word in words))
    again = run("merge", recipe, "--out", tmp_path / "again", "-q")
    assert again.code == 0, again.err
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_the_tables_of_two_models_name_them(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2)
    result = run(*pair, "--fisher", saved_fisher, "--out", tmp_path / "out", "-q")
    assert [line.split(": ")[0] for line in result.out.splitlines()[2:6]] == [str(models.ft)] * 2 + [
        str(models.ft2)
    ] * 2


# --- errors, interruptions, terminals -----------------------------------------------------------------------------


def test_debug_shows_a_traceback(models: Models, tmp_path: Path, run: Run) -> None:
    spoil(models.ft, MATRIX, torch.nan)
    pair = ["--base", str(models.base), "--ft", str(models.ft), "--out", str(tmp_path / "out"), "-m", "ties"]
    plain = run(*pair)
    command = [sys.executable, "-m", "streammerge", *pair, "--debug"]
    debug = subprocess.run(command, capture_output=True, text=True)
    assert (debug.returncode, debug.stdout) == (plain.code, "") == (1, plain.out)
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert "require_finite" in debug.stderr
    assert plain.err.removeprefix("streammerge: error: ").strip() in debug.stderr.splitlines()[-1]


PAIR = ("--base", "a", "--ft", "b")
STOPPED = {  # the arguments, what is called, and what the same command does
    "merge": (("merge", *PAIR, "--out", "c"), "merge", "goes on where it was"),
    "merge anew": (("merge", *PAIR, "--out", "c", "--overwrite"), "merge", "begins anew, as --overwrite asks"),
    "dry run": (("merge", *PAIR, "--dry-run"), "plan", "begins anew"),
    "fisher": (("fisher", "--base", "a", "--out", "c"), "fisher", "goes on where it was"),
    "push": (("push", "a", "org/a"), "push", "goes on where it was"),
    "sweep": (("sweep", "mini_l2s", "--set", "density=0.1", "--out", "c"), "sweep", "goes on where it was"),
    "plan": (("plan", *PAIR), "plan", "begins anew"),
    "verify": (("verify", "a"), "verify", "begins anew"),
    "diagnose": (("diagnose", "a", "--against", "b"), "diagnose", "begins anew"),
    "methods": (("methods",), "catalogue.listing_text", "begins anew"),
    "demo": (("demo", "--out", "c"), "demo.run", "begins anew"),
    "eval": (("eval", "a"), "evaluate", "begins anew; with --out it would keep the tasks that are done"),
    "eval with --out": (
        ("eval", "--compare", "a", "b", "--out", "c"),
        "compare",
        "goes on with the tasks that are not in --out; the one it was at starts over",
    ),
}


@pytest.mark.parametrize(("arguments", "called", "again"), STOPPED.values(), ids=STOPPED)
def test_ctrl_c_exits_with_130_and_advice(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], called: str, again: str
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    import_module("streammerge.demo")  # which its command imports no sooner than it is run
    monkeypatch.setattr(f"streammerge.{called}", stop)
    assert run(*arguments) == (130, "", f"streammerge: stopped; the same command {again}\n")


def test_an_interrupted_merge_goes_on(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the work, once two shards are done."""
    from streammerge.checkpoints.writer import CheckpointWriter

    pair = ("--base", models.base, "--ft", models.ft, "-m", "ties", "--max-shard-size", "4KB", "--threads", "1", "-q")
    assert run(*pair, "--out", tmp_path / "whole").code == 0
    complete = CheckpointWriter.complete

    def stopping(self: CheckpointWriter, name: str, *rest: Any) -> None:
        complete(self, name, *rest)
        if name == MATRIX:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "complete", stopping)
        assert run(*pair, "--out", tmp_path / "out").code == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".streammerge"]
    result = run(*pair, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


RAW = "we\x1b[31m\u202e\x07ird"


def test_control_characters_do_not_reach_the_terminal(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    weird, out = tmp_path / f"ft{RAW}", tmp_path / f"out{RAW}"
    copytree(models.ft, weird)
    put(weird, HEAD, torch.ones(48, 16))
    edit_config(weird, max_position_embeddings=7)
    pair = ("--base", models.base, "--ft", weird)
    calls: list[tuple[object, ...]] = [
        (*pair, "--ft", models.ft, "--fisher", saved_fisher, "--out", out),
        ("plan", *pair),
        ("plan", *pair, "--json"),
        ("verify", out),
        ("verify", out, "--json"),
        ("fisher", "--base", weird, "--fisher-samples", "1", "--out", tmp_path / f"f{RAW}"),
    ]
    results = [run(*call) for call in calls]
    assert [result.code for result in results] == [0] * len(calls), results
    (out / "LICENSE").unlink()
    put(weird, f"tensor{RAW}", torch.ones(1))
    bad: list[tuple[object, ...]] = [
        (*pair, "--out", tmp_path / f"other{RAW}"),
        ("plan", *pair),
        ("verify", out),
        ("verify", weird),
        (*pair, "--out", weird),
        (tmp_path / f"recipe{RAW}", "--out", "o"),
        ("--base", f"no{RAW}", "--ft", "b", "--out", "o"),
        (*pair, "--out", "o", "-m", RAW),
    ]
    failed = [run(*call) for call in bad]
    assert [result.code for result in failed] == [1] * len(bad)
    for result in (*results, *failed):
        assert all(c.isprintable() or c == "\n" for c in result.out + result.err), result
    assert "\\x1b[31m\\u202e\\x07ird" in failed[0].err


def test_folders_whose_names_are_not_unicode(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> None:
    """A model's name goes into the recipe, which is text; other folders may be called what they like."""
    weird = Path(os.fsdecode(os.fsencode(tmp_path) + b"/we\xffird"))
    copytree(models.ft, weird)
    result = run("--base", models.base, "--ft", weird, "--out", tmp_path / "out")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "models.0.model: " in result.err and "must be a text in Unicode" in result.err
    assert not (tmp_path / "out").exists()
    fisher, out = weird / "fisher", weird / "out"
    copytree(saved_fisher, fisher)
    result = run("--base", models.base, "--ft", models.ft, "--fisher", fisher, "--out", out, "-q")
    assert result.code == 0, result.err
    assert run("verify", out).out.startswith(f"{tmp_path}/we\\udcffird/out: ok: ")


def test_as_a_module_in_a_process_of_its_own(models: Models, tmp_path: Path) -> None:
    pair = ["--base", "base", "--ft", "ft", "--out", "out", "--method", "task-arithmetic"]
    command = [sys.executable, "-W", "error", "-m", "streammerge", *pair]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"26 tensors merged, 0 copied from the base: \d\d\.\d KB in out\n", done.stdout)
    assert json.loads((tmp_path / "out" / "streammerge.json").read_text())["recipe"]["base"] == "base"
    command = [sys.executable, "-m", "streammerge", "verify", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("streammerge: error: nowhere: there is no streammerge.json")


def test_a_closed_pipe_is_no_traceback(merged: Merged) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "streammerge", "verify", str(merged())]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (("methods", "--json"), ""),
        (("methods",), "1"),
        (("--help",), ""),
        (("merge", "--help"), ""),
        (("--version",), ""),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(arguments: tuple[str, ...], unbuffered: str) -> None:
    full = "streammerge: error: standard output cannot be written: No space left on device\n"
    assert into("/dev/full", *arguments, unbuffered=unbuffered) == (1, full)
    assert into("", *arguments, unbuffered=unbuffered) == (1, "streammerge: error: standard output is closed\n")


def test_what_is_complete_though_it_cannot_be_told(models: Models, tmp_path: Path) -> None:
    pair = ("--base", str(models.base), "--ft", str(models.ft), "-m", "ties", "-q", "--out")
    whole, out, other = (tmp_path / name for name in ("whole", "out", "other"))
    assert into(os.devnull, *pair, str(whole)) == (0, "")
    end = "; the merge is complete: "
    line = f"streammerge: error: standard output cannot be written: No space left on device{end}{out}\n"
    assert into("/dev/full", *pair, str(out)) == (1, line)
    assert into("", *pair, str(other)) == (1, f"streammerge: error: standard output is closed{end}{other}\n")
    for folder in (out, other):
        assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def into(output: str, *arguments: str, unbuffered: str = "") -> tuple[int, str]:
    """Exit status and standard error with standard output going there; closed where that is nowhere."""
    command = shlex.join([sys.executable, "-m", "streammerge", *arguments])
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        f"{command} >{output or '&-'}", shell=True, stderr=subprocess.PIPE, text=True, env=environment
    )
    return done.returncode, done.stderr


def test_an_option_overrides_a_per_model_value_of_the_recipe(models: Models, tmp_path: Path, run: Run) -> None:
    recipe = {"base": str(models.base), "models": [{"model": str(models.ft), "parameters": {"coefficient": 1.0}}]}
    (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "method": "task_arithmetic"}))
    result = run("plan", str(tmp_path / "r.yaml"), "--coefficient", "0.25", "--json")
    assert json.loads(result.out)["models"][0]["coefficient"] == 0.25


def test_a_dry_run_checks_the_output_folder(models: Models, run: Run) -> None:
    result = run("merge", "--base", str(models.base), "--ft", str(models.ft), "--out", str(models.base), "--dry-run")
    assert result.code == 1
    assert "is also an input" in result.err
