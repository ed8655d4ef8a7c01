"""Exit statuses and words where something goes wrong: errors, interruptions, odd names, outputs that take nothing."""

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
from tiny_models import HEAD, MATRIX, WEIGHTS, Models, Run, content, edit_config, put, spoil

Merged = Callable[..., Path]


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


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--base", "--ft", "b", "--out", "c"), "--base", "--ft"),
        (("--base", "a", "--ft", "b", "--out", "-q"), "--out", "-q"),
        (("plan", "--base", "a", "--ft", "b", "-m", "--normalize"), "-m", "--normalize"),
        (("fisher", "--base", "--out", "c"), "--base", "--out"),
    ],
)
def test_an_option_is_not_taken_for_the_value_of_another(
    run: Run, arguments: tuple[str, ...], name: str, value: str
) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert f"Option '{name}' requires an argument, and '{value}' is an option." in " ".join(
        result.err.replace("│", " ").split()
    )


def test_what_looks_like_an_option_can_still_be_named(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(models.ft, tmp_path / "--ft")
    monkeypatch.chdir(tmp_path)
    result = run("--base", models.base, "--ft=--ft", "--out", "out", "-m", "linear")
    assert result.code == 0, result.err


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
