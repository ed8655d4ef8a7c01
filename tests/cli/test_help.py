"""Help and usage errors: what each command takes, and what it says of the rest."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import Models, Run, content, give_tokenizer

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
