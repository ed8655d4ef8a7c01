"""The comparison with mergekit, apart from mergekit: distances, positions left out, statistics, nothing forgotten."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import parity_mergekit
import pytest
import torch
from parity import chance, environment, equality
from parity.bench import Bench, Models
from parity.cases import CASES, NO_PEER, Case
from parity.checking import Changed
from parity.differences import DIFFERENCES, GONE, Difference
from parity.environment import EnvironmentFailure, Peer, PeerRefused, make_environment
from parity.models import MATRIX, State, load, make_models, save, shapes
from parity.ulps import gaps, largest, ulp
from parity.unsettled import between, boundaries, importance_quartiles, magnitude_ties, variance_ties
from torch import Tensor

from streammerge import METHODS
from streammerge.recipe import make_recipe, resolve_method

# ---- nothing is left out ---------------------------------------------------------------------------------------


def test_every_method_has_a_case_or_a_reason() -> None:
    assert parity_mergekit.uncovered() == []
    compared = {case.method for case in CASES} | set(chance.CASES)
    assert compared <= set(METHODS)
    assert not compared & set(NO_PEER)
    assert {difference.method for difference in (*DIFFERENCES, *GONE)} <= compared


def test_a_method_without_a_case_is_told_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_mergekit, "METHODS", {**METHODS, "brand_new": None})
    assert parity_mergekit.uncovered() == ["brand_new"]
    results = parity_mergekit.Results({"mergekit": "0.1.5"})
    assert not results.holds
    assert [line for line in parity_mergekit.lines(results) if line.startswith("NO CASE: `brand_new`")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.variant}".strip())
def test_our_parameters_exist(case: Case) -> None:
    models = [f"ft{i}" for i in range(case.experts)]
    recipe = {"base": "base", "models": models, "method": case.method, "parameters": dict(case.ours)}
    resolve_method(make_recipe(recipe), 1000)
    listed = case.experts + (case.role == "point")
    assert all(len(values) == listed for values in case.each.values())


# ---- distances -------------------------------------------------------------------------------------------------


def test_ulp_by_hand() -> None:
    magnitudes = torch.tensor([1.0, 1.5, 1.9999999, 2.0, 0.5, 0.75, 0.0, 1e-45])
    expected = [2.0**-23, 2.0**-23, 2.0**-23, 2.0**-22, 2.0**-24, 2.0**-24, 2.0**-149, 2.0**-149]
    assert ulp(magnitudes).tolist() == expected


def test_ulp_is_the_step_to_the_next_number() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 10 + 1e-30
    steps = values.nextafter(torch.tensor(math.inf)).double() - values.double()
    assert torch.equal(ulp(values), steps)


def test_gaps_by_hand() -> None:
    left, right = torch.tensor([1.0, 0.0, math.nan, 3.0]), torch.tensor([1.0 + 3 * 2.0**-23, 0.0, 1.0, 3.0])
    assert gaps(left, right, 2.0**-23).tolist() == [3.0, 0.0, math.inf, 0.0]
    assert largest(gaps(left, right)) == math.inf
    assert largest(torch.empty(0)) == 0.0


@pytest.mark.parametrize(
    ("apart", "ours_off", "peer_off", "verdict"),
    [
        (2.0, 9.0, 9.0, "equal"),  # the same rounding on both sides
        (2.5, 2.9, 3.5, "ours nearer"),
        (2.5, 2.9, 2.8, "rounding"),
        (2.5, 2.9, 2.9, "rounding"),
        (4.0, 3.1, 3.2, "DIFFERS"),
        (4.0, 2.0, math.inf, "ours nearer"),
        (math.inf, math.inf, 1.0, "DIFFERS"),
    ],
)
def test_verdicts(apart: float, ours_off: float, peer_off: float, verdict: str) -> None:
    row = equality.Row("linear", "", "near, 1", apart, 0.0, ours_off, peer_off, 0, 0)
    assert row.verdict == verdict
    assert row.holds == (verdict != "DIFFERS")
    assert row.as_json()["verdict"] == verdict


# ---- positions left out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (2, 2, []),  # 5 and 4 are kept, no other is as large
        (3, 3, [1, 2, 5]),  # one of the three 3s is kept
        (4, 4, [1, 2, 5]),
        (5, 5, []),  # all three
        (1, 2, [4]),  # one tool keeps the 4
        (2, 3, [1, 2, 5]),
        (1, 4, [1, 2, 4, 5]),
        (6, 6, []),  # a zero is kept: nothing
        (5, 7, []),
        (0, 0, []),
        (7, 7, []),
    ],
)
def test_between_by_hand(first: int, second: int, expected: list[int]) -> None:
    scores = torch.tensor([5.0, 3.0, 3.0, 0.0, 4.0, 3.0, 0.0])
    for a, b in ((first, second), (second, first)):
        assert between(scores, a, b).nonzero().flatten().tolist() == expected


def test_between_with_a_tolerance() -> None:
    scores = torch.tensor([1.0, 0.999, 0.9985, 0.5])
    assert between(scores, 1, 1).sum() == 0
    assert between(scores, 1, 1, 2e-3).tolist() == [True, True, True, False]
    assert between(scores, 3, 3, 2e-3).sum() == 0


@pytest.mark.parametrize(
    ("density", "gamma", "n", "expected"),
    [
        (0.5, 0.0, 16, [(8, 8)]),
        (0.6, 0.0, 16, [(10, 9)]),
        (0.2, 0.0, 2, [(0, 1)]),
        (0.5, 0.25, 16, [(4, 4), (12, 12)]),
        (0.9, 0.25, 20, [(2, 2), (20, 20)]),  # fewer outliers, so that both fit
        (0.5, 0.01, 99, [(1, 0), (51, 49)]),
    ],
)
def test_boundaries_by_hand(density: float, gamma: float, n: int, expected: list[tuple[int, int]]) -> None:
    assert boundaries(density, gamma, n) == expected


def test_the_densities_compared_leave_whole_numbers() -> None:
    for case in CASES:
        for density in case.each.get("density", []):
            for shape in shapes().values():
                for ours, theirs in boundaries(density, case.theirs.get("gamma", 0.0), math.prod(shape)):
                    assert ours == theirs


def test_ties_of_any_expert_count() -> None:
    base = torch.zeros(4)
    experts = torch.tensor([1.0, -2.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 1.0, -1.0])
    assert magnitude_ties([0.25, 0.5])([base, *experts]).tolist() == [False, True, True, True]


def test_variances_that_tie() -> None:
    base = torch.zeros(4)
    experts = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])  # variances 1/4, 1/4, 1, 0
    assert variance_ties(0.7)([base, *experts]).tolist() == [True, True, False, False]  # k = 2 of 3
    assert variance_ties(0.5)([base, *experts]).tolist() == [False] * 4  # k = 1


def test_importances_between_the_quartiles_thresholds() -> None:
    change = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 4.5]) / 10  # thresholds 4 and 5, see check_entries.py
    assert importance_quartiles([torch.zeros(8), change]).nonzero().flatten().tolist() == [7]


# ---- statistics ------------------------------------------------------------------------------------------------


def test_paired_z_by_hand() -> None:
    left, right = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 2.0, 2.0, 2.0])  # 1, 0, 1, 4: mean 1.5
    assert chance.paired_z(left, right) == pytest.approx(1.5 * 2 / math.sqrt(9 / 3))
    assert chance.paired_z(left, left) == 0


Keep = Callable[[Tensor], Tensor]


def flat(p: float) -> Keep:
    return lambda ranks: torch.full_like(ranks, p)


def rising(low: float, high: float) -> Keep:
    return lambda ranks: low + (high - low) * ranks


@pytest.mark.parametrize(
    ("ours", "theirs", "factor", "alike"),
    [
        (flat(0.5), flat(0.5), 2.0, True),
        (rising(0.35, 0.65), rising(0.35, 0.65), 2.0, True),
        (flat(0.5), flat(0.52), 2.0, False),
        (rising(0.35, 0.65), flat(0.5), 2.0, False),
        (rising(0.35, 0.65), rising(0.65, 0.35), 2.0, False),
        (flat(0.5), flat(0.5), 2.1, False),  # another rescale
    ],
)
def test_draws_from_other_probabilities_are_told_apart(ours: Keep, theirs: Keep, factor: float, alike: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    ranks = vector.abs().argsort(1).argsort(1) / 255

    def draw(keep: Keep) -> Tensor:
        return vector * (torch.rand(vector.shape, generator=generator) < keep(ranks))

    row = chance.summarise("dare_linear", "large, 1", 2.0 * draw(ours), factor * draw(theirs), vector.abs())
    assert row.holds == alike
    assert row.verdict == ("alike" if alike else "DIFFERS")


# ---- the same merge by both ------------------------------------------------------------------------------------


class Averager(Peer):
    """Stands in for mergekit: a weighted mean in float64, `off` by something in one place."""

    def __init__(self, off: float = 0.0) -> None:
        self.off, self.configs = off, list[Mapping[str, Any]]()

    def merge(self, config: Mapping[str, Any], out: Path, seed: int | None = None) -> None:
        self.configs.append(config)
        states = [load(Path(model["model"])) for model in config["models"]]
        weights = [model["parameters"]["weight"] for model in config["models"]]
        merged: State = {}
        for name, first in states[0].items():
            total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
            merged[name] = (torch.as_tensor(total) / sum(weights)).to(first.dtype)
        merged[MATRIX][0, 0] += self.off
        save(out, merged)


def compared(folder: Path, off: float) -> tuple[equality.Row, Averager]:
    peer = Averager(off)
    bench = Bench(folder, peer)
    states = make_models(0.002, experts=2)
    models, wide = bench.models(states), bench.models([equality.as_float64(state) for state in states])
    (case,) = [case for case in CASES if case.method == "linear" and case.role == "none"]
    case = Case("linear", "", {**case.ours, "coefficient": [0.3, 0.9]}, {}, {"weight": [0.3, 0.9]}, 2, role="none")
    return equality.compare(bench, case, models, wide), peer


def test_equal_merges_are_equal(tmp_path: Path) -> None:
    row, peer = compared(tmp_path, 0.0)
    assert (row.verdict, row.beyond, row.excluded) == ("equal", 0, 0)
    assert row.peer_off <= 0.5  # float64 rounded once
    narrow, wide = peer.configs
    assert narrow["dtype"] == "float32" and "dtype" not in wide and "base_model" not in narrow
    assert [model["parameters"] for model in narrow["models"]] == [{"weight": 0.3}, {"weight": 0.9}]


def test_one_entry_off_is_found(tmp_path: Path) -> None:
    row, _ = compared(tmp_path, 1e-6)
    assert (row.verdict, row.beyond) == ("DIFFERS", 1)
    assert row.absolute == pytest.approx(1e-6, rel=0.01)


def test_the_base_models_place(tmp_path: Path) -> None:
    peer = Averager()
    bench = Bench(tmp_path, peer)
    models = bench.models(make_models(0.002, experts=1))
    bench.theirs("linear", models, role="point", each={"weight": [1, 2]})
    bench.theirs("linear", models, role="base", each={"weight": [1]}, normalize=False)
    listed, given = peer.configs
    assert [model["model"] for model in listed["models"]] == [str(path) for path in models.paths]
    assert given["base_model"] == str(models.base) and given["parameters"] == {"normalize": False}
    assert [model["model"] for model in given["models"]] == [str(path) for path in models.experts]


def test_the_models() -> None:
    base, *experts = make_models(0.002)
    again = make_models(0.002)
    assert all(torch.equal(value, again[0][name]) for name, value in base.items())
    vectors = [expert[MATRIX] - base[MATRIX] for expert in experts]
    for vector in vectors:
        assert (vector == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
        assert vector.square().mean().sqrt().item() == pytest.approx(0.002 * math.sqrt(0.75), rel=0.15)
    cosine = torch.cosine_similarity(vectors[0].flatten(), vectors[1].flatten(), dim=0).item()
    assert cosine == pytest.approx(0.64 * 0.75, abs=0.1)


# ---- the command -----------------------------------------------------------------------------------------------


def test_a_difference_that_is_not_so_fails() -> None:
    def changed(bench: Bench) -> str:
        raise Changed("it rounds up")

    difference = Difference("ties", "k rounds down", "to the nearest", changed)
    found = parity_mergekit.check(Bench(Path(), Averager()), difference)
    assert found.measured == "NOT SO: it rounds up"
    assert not parity_mergekit.Results({"mergekit": "0.1.5"}, intended=[found]).holds


def test_a_python_without_mergekit_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for python in (sys.executable, str(tmp_path / "none")):
        assert parity_mergekit.main(["--peer-python", python]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and python in error and error.count("\n") == 1


def test_no_package_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        code = int("pip" in command)
        return subprocess.CompletedProcess(command, code, "", "WARNING: Retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(EnvironmentFailure, match=r"No matching distribution\).*--peer-python"):
        make_environment(tmp_path / "environment")


def test_a_finished_environment_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        tmp_path.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environment.subprocess, "run", run)
    python = make_environment(tmp_path)
    assert [command[-1] for command in commands] == [str(tmp_path), "torch==2.13.0", "mergekit==0.1.5"]
    assert make_environment(tmp_path) == python == tmp_path / "bin" / "python"
    assert len(commands) == 3


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho \'{"mergekit": "0"}\'\nread job\necho \'{"error": "ValueError: no"}\'\n')
    stand_in.chmod(0o755)
    with Peer(stand_in, tmp_path / "log") as peer:
        assert peer.versions == {"mergekit": "0"}
        with pytest.raises(PeerRefused, match="ValueError: no"):
            peer.merge({}, tmp_path / "out")
        with pytest.raises(EnvironmentFailure, match="ended: no reason given"):
            peer.merge({}, tmp_path / "out")


def test_models_hold_their_first_experts() -> None:
    models = Models((Path("a"), Path("b"), Path("c")))
    assert models.first(1).paths == (Path("a"), Path("b")) and models.experts == (Path("b"), Path("c"))
