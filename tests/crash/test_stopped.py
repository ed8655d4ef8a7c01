"""SIGINT and SIGTERM: one line that says how to go on, 130 or 143, no traceback, and nothing done is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from interrupted import Ended, Processes
from tiny_models import content

WORK = ".streammerge"
GOES_ON = "streammerge: stopped; the same command goes on where it was\n"
NOT_BEGUN = "streammerge: stopped before anything was begun\n"
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
OPTIONS = ("--fisher-samples", "2", "--fisher-length", "16", "--device", "cpu", "--max-shard-size", "60KB", "-q")
PLACES = {
    "the way forward": "after forward 1",
    "the way back": "after backward 2",
    "a tensor of the Fisher": "after done model.layers.2.mlp.up_proj.weight",
    "the survey": "before survey",
    "the merge": "before merge",
    "the move": "before replace streammerge.json",
    "the end": "before remove",
}
COMPLETE = "complete model.layers.1.mlp.up_proj.weight #2"  # the first time it was a tensor of the Fisher
STUCK = ["before forward 1", "before backward 2", "before merge", "after merge", "before replace streammerge.json"]


def with_both(places: Iterable[str], *short: tuple[str, int]) -> pytest.MarkDecorator:
    """Every place with either signal, of which only the `short` ones are tested always."""
    pairs = [(place, number) for place in places for number in (SIGINT, SIGTERM)]
    assert {*short} < {*pairs}
    marks = [() if pair in short else pytest.mark.full for pair in pairs]
    names = [f"{place}-{signal.Signals(number).name}" for place, number in pairs]
    cases = [pytest.param(*pair, marks=mark, id=name) for pair, mark, name in zip(pairs, marks, names, strict=True)]
    return pytest.mark.parametrize(("place", "number"), cases)


@pytest.fixture(scope="module")
def whole(processes: Processes, pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ended = processes.run("--base", pair[0], "--ft", pair[1], "--out", out, *OPTIONS)
    assert ended.status == 0, ended.err
    return dict(content(out))


class Run:
    """One merge, stopped and resumed."""

    def __init__(self, processes: Processes, pair: tuple[Path, Path], out: Path) -> None:
        self.processes, self.out = processes, out
        self.arguments = ("--base", pair[0], "--ft", pair[1], "--out", out, *OPTIONS)

    def stopped(self, number: int, **how: object) -> Ended:
        ended = self.processes.run(*self.arguments, signal=number, sync_seconds=0.0, **how)
        assert (ended.status, ended.err) == (128 + number, GOES_ON), ended.steps[-3:]
        assert "got away" not in ended.steps  # with its status once the long call was over
        return ended

    def resumed(self) -> dict[str, object]:
        if (self.out / WORK).exists():
            ended = self.processes.run(*self.arguments)
            assert ended.status == 0, ended.err
        return dict(content(self.out))


@pytest.fixture
def run(processes: Processes, pair: tuple[Path, Path], tmp_path: Path) -> Run:
    return Run(processes, pair, tmp_path / "out")


@with_both(PLACES, ("the way back", SIGINT), ("the merge", SIGTERM), ("the move", SIGINT))
def test_stopped_in(run: Run, whole: dict[str, object], place: str, number: int) -> None:
    run.stopped(number, at=PLACES[place])
    assert run.resumed() == whole


@with_both(STUCK, ("before backward 2", SIGTERM), ("after merge", SIGINT))
def test_a_long_call_of_c_does_not_hold_it_up(run: Run, whole: dict[str, object], place: str, number: int) -> None:
    """Python cannot raise anything in the main thread then."""
    run.stopped(number, at=place, stuck=True)
    assert run.resumed() == whole


def test_nor_does_a_worker(run: Run, whole: dict[str, object]) -> None:
    """The main thread is told, and waits for its threads, one of which is stuck."""
    ended = run.stopped(SIGINT, at=f"before {COMPLETE}", stuck=True)
    assert "before merge" in ended.steps and "after merge" not in ended.steps
    assert run.resumed() == whole


def test_the_second_signal_ends_it_at_once(run: Run, whole: dict[str, object]) -> None:
    run.stopped(SIGTERM, at="before backward 2", stuck=True, grace=600.0)
    assert run.resumed() == whole


def test_what_was_complete_is_not_done_again(run: Run, whole: dict[str, object]) -> None:
    ended = run.stopped(SIGTERM, at=f"after {COMPLETE}")
    done = {step.removesuffix(" #2") for step in ended.steps if step.startswith("after complete ") and "#2" in step}
    again = run.processes.run(*run.arguments)
    assert f"after {COMPLETE}".removesuffix(" #2") in done and len(done) >= 5  # how many depends on the other thread
    assert not done & {*again.steps}
    assert run.resumed() == whole


# --- while Python imports -------------------------------------------------------------------------------------------

IMPORTS = ["streammerge.signals", "pydantic.types", "streammerge.merge", "typer.main"]


def stopped_at_import(module: str, number: int, *arguments: object) -> tuple[int, str]:
    """Send the signal right after a module was imported; the exit status, and what was said."""
    command = [sys.executable, "-X", "importtime", "-m", "streammerge", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rsplit("|")[-1].strip() == module:
            break
    process.send_signal(number)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    process.stderr.close()
    return process.wait(), "".join(said)


@with_both(IMPORTS, ("streammerge.signals", SIGINT), ("typer.main", SIGTERM))
def test_stopped_before_it_begins(place: str, number: int) -> None:
    assert stopped_at_import(place, number, "verify", "nowhere") == (128 + number, NOT_BEGUN)


@with_both(["torch.types", "transformers.utils"], ("torch.types", SIGTERM))
def test_stopped_while_it_imports_torch_or_transformers(
    pair: tuple[Path, Path], tmp_path: Path, place: str, number: int
) -> None:
    out = tmp_path / "out"
    arguments = ("--base", pair[0], "--ft", pair[1], "--out", out, *OPTIONS)
    assert stopped_at_import(place, number, *arguments) == (128 + number, GOES_ON)
    assert not out.exists() or [path.name for path in out.iterdir()] == [WORK]


def test_what_the_starter_ignores_stays_ignored() -> None:
    """As for a background job of a shell without job control: it is not the terminal's to stop."""
    command = [sys.executable, "-X", "importtime", "-m", "streammerge", "methods"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_IGN),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith("streammerge.signals\n"):
            os.kill(process.pid, SIGINT)
            break
    out, _ = process.communicate()
    assert process.returncode == 0 and "fim_ties" in out


# --- one process at a time ------------------------------------------------------------------------------------------


def test_the_second_process_is_refused_and_the_lock_dies_with_the_first(run: Run, whole: dict[str, object]) -> None:
    command = [sys.executable, "-m", "streammerge", *map(str, run.arguments)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(run.out.glob(f"{WORK}/fisher-0/{WORK}/walk/input-*")):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as this takes
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)
    left = content(run.out)
    for options in ((), ("--overwrite",)):
        second = run.processes.run(*run.arguments, *options)
        message = f"streammerge: error: output folder {run.out} is being written by another process: "
        assert (second.status, second.err) == (1, f"{message}wait for it, or choose another --out\n")
        assert content(run.out) == left
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert run.resumed() == whole
