"""Killed again and again, at random moments, a merge ends with the bytes of one that was left alone.

A phase and a moment within it are drawn; the signal is sent by the clock, whatever the process does then. Where it was
is what its steps say. No unfinished folder loads as a model, whoever looks.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from interrupted import Ended, Processes
from tiny_models import content
from transformers import AutoModelForCausalLM

from streammerge.checkpoints.checkpoint import REPORT_FILE, Checkpoint
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.errors import CheckpointError

WORK = ".streammerge"
PHASES = ("start", "Fisher", "coefficients", "merge", "finalise")
BEGINS = {
    "before measure": "Fisher",
    "after measure": "coefficients",
    "before survey": "coefficients",
    "before merge": "merge",
    "after merge": "finalise",
}
MOVES = ("before replace", "after replace", "before unlink", "before remove", "after remove")


@dataclass(frozen=True)
class Case:
    """A command, and the phases that it goes through."""

    options: tuple[str, ...]
    phases: tuple[str, ...]
    forks: bool = False


CASES = {
    "fim_ties": Case(("--fisher-samples", "2", "--fisher-length", "16", "--device", "cpu"), PHASES),
    "ties": Case(("-m", "ties", "--threads", "2"), ("start", "merge", "finalise")),
    "forks": Case(("-m", "ties", "--threads", "2"), ("start", "merge", "finalise"), forks=True),
    "many shards": Case(("-m", "dare_ties", "--max-shard-size", "30KB"), ("start", "merge", "finalise")),
}


def phase_of(steps: list[str]) -> str:
    """What a process was at after these steps."""
    return next((BEGINS[step] for step in reversed(steps) if step in BEGINS), "start")


def whole_folder(out: Path) -> dict[str, bytes | None]:
    return {name: raw for name, raw in content(out).items() if name.split("/")[0] != WORK}


class Victim:
    """One command that is killed and resumed, and what was seen.

    Attributes:
        kills: how many ended each phase.
        refused: phases after which transformers was asked to load what was there, and could not.
    """

    def __init__(self, case: Case, processes: Processes, pair: tuple[Path, Path], folder: Path) -> None:
        self.case, self.processes, self.folder = case, processes, folder
        self._arguments = ("--base", pair[0], "--ft", pair[1], "-q", *case.options)
        self.kills: Counter[str] = Counter()
        self.refused: set[str] = set()
        ended = self._run(folder / "whole")
        assert ended.status == 0, ended.err
        self.expected = content(folder / "whole")
        self._moves = [step for step in ended.steps[ended.steps.index("after merge") :] if step.startswith(MOVES)]
        self._spans = self._phases(ended)

    def round(self, draw: random.Random, out: Path, kills: int) -> None:
        """Kill it so many times in phases that are drawn, none before the one reached, then let it end."""
        for phase in sorted(draw.choices(self.case.phases, k=kills), key=PHASES.index):
            at, lasts = self._spans[phase]
            delay: float | None = draw.uniform(0, lasts)
            if phase == "finalise" and (not self.kills[phase] or draw.random() < 0.7):
                moves = self._moves if self.kills[phase] else self._moves[len(self._moves) // 2 :][:1]
                at, delay = draw.choice(moves), None  # once in the very middle
            ended = self._run(out, at, delay, draw.choice([0.0, 2.0]))
            if ended.status != -signal.SIGKILL:
                break  # this phase, or this move, was behind it
            self.kills[phase_of(ended.steps)] += 1
            if not self._check(out, phase_of(ended.steps)):
                return
        else:
            ended = self._run(out)
        assert ended.status == 0, ended.err
        assert content(out) == self.expected

    def _check(self, out: Path, phase: str) -> bool:
        """That what is there is no model, or all of it; whether anything is left to do."""
        if not out.exists():
            return True
        found = whole_folder(out)
        assert {name: self.expected[name] for name in found} == found  # nothing in sight that is not as it should be
        if INDEX_FILE in found or SINGLE_FILE in found:
            assert phase == "finalise" and found == self.expected
            return (out / WORK).exists()
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)
        if phase not in self.refused:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
            self.refused.add(phase)
        return True

    def _run(self, out: Path, at: str | None = None, delay: float | None = None, sync: float = 2.0) -> Ended:
        how = {"at": at, "delay": delay, "sync_seconds": sync, "forks": self.case.forks}
        return self.processes.run(*self._arguments, "--out", out, **how)

    def _phases(self, ended: Ended) -> dict[str, tuple[str | None, float]]:
        """The first step of each phase, and how many seconds the phase lasts."""
        starts: dict[str, tuple[str | None, float]] = {"start": (None, 0.0)}
        for step, at in zip(ended.steps, ended.times, strict=True):
            if step in BEGINS:
                starts.setdefault(BEGINS[step], (step, at))
        assert tuple(starts) == self.case.phases
        stops = [*[at for _, at in starts.values()][1:], ended.times[-1]]
        return {phase: (step, stop - at) for (phase, (step, at)), stop in zip(starts.items(), stops, strict=True)}


def kill(victim: Victim, kills: int, per_round: int) -> None:
    """Rounds of kills, until there were as many as that, and a fair share of them in every phase."""
    share = max(1, kills // (3 * len(victim.case.phases)))
    phases = {*victim.case.phases}
    draw = random.Random(kills)
    for number in range(10 * kills):
        enough = victim.kills.total() >= kills and all(victim.kills[phase] >= share for phase in phases)
        if enough and victim.refused >= phases - {"start"}:
            break
        victim.round(draw, victim.folder / f"out-{number}", per_round)
    print(f"{dict(victim.kills)}: {victim.kills.total()} kills in {number} rounds")
    assert victim.kills.total() >= kills
    assert min(victim.kills[phase] for phase in phases) >= share
    assert victim.refused >= phases - {"start"}


@pytest.mark.parametrize("kills", [pytest.param(4, id="short"), pytest.param(80, id="full", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(
    processes: Processes, pair: tuple[Path, Path], tmp_path: Path, name: str, kills: int
) -> None:
    kill(Victim(CASES[name], processes, pair, tmp_path), kills, per_round=min(kills, 6))


def test_a_report_is_there_only_when_all_else_is(processes: Processes, pair: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("--base", pair[0], "--ft", pair[1], "-q", "-m", "ties", "--max-shard-size", "100KB", "--out")
    ended = processes.run(*arguments, tmp_path / "whole", report=True)
    assert ended.status == 0 and (tmp_path / "whole" / REPORT_FILE).exists(), ended.err
    expected = {name: raw for name, raw in content(tmp_path / "whole").items() if name != REPORT_FILE}
    moves = [step for step in ended.steps if step.startswith(("before replace", "after replace"))]
    assert moves[-1] == f"after replace {REPORT_FILE}"
    for number, step in enumerate(moves[-5:]):
        out = tmp_path / f"out-{number}"
        assert processes.run(*arguments, out, at=step, report=True).status == -signal.SIGKILL
        found = whole_folder(out)
        if found.pop(REPORT_FILE, None) is not None:
            assert step == moves[-1] and found == expected
        assert processes.run(*arguments, out, report=True).status == 0
        found = content(out)
        assert found.pop(REPORT_FILE) is not None and found == expected
