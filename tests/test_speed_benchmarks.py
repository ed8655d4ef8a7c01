"""The benchmarks of speed, on the smallest shape and without mergekit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import merge_speed
import pytest
import raw_copy
import scaling
import start_up
import where_time_goes
from make_checkpoints import make_pair
from measuring import CommandFailed, Runs, Usage, in_turn, measure

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.methods import METHODS


def test_a_process_is_measured_alone() -> None:
    """Not with the memory of the one that starts it: this one has torch."""
    used = measure([sys.executable, "-c", "kept = bytearray(64 << 20); sum(range(10 ** 6))"])
    assert 64 < used.peak < 110
    assert 0 < used.cpu <= used.wall + 1
    with pytest.raises(CommandFailed, match="status 3: no"):
        measure([sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"])


FAMILY = """
import os, time

def held(count):
    memory = bytearray(count)
    memory[::4096] = b"1" * len(memory[::4096])
    return memory

shared = held(64 << 20)
for _ in range(2):
    if os.fork() == 0:
        own = held(32 << 20)
        time.sleep(1)
        os._exit(0)
os.wait(), os.wait()
"""


def test_processes_of_a_process_are_measured_with_it_and_what_they_share_once() -> None:
    alone = measure([sys.executable, "-c", FAMILY])
    together = measure([sys.executable, "-c", FAMILY], looks=0.1)
    assert together.peak - alone.peak == pytest.approx(32, abs=6)  # the largest alone has one fork's own, too


def test_runs_are_made_in_turn_and_slow_ones_once() -> None:
    called: list[str] = []

    def runner(name: str, wall: float) -> Usage:
        called.append(name)
        return Usage(wall * len(called), 1.0, len(called))

    walls = {"a": 1.0, "b": 2.0, "slow": 1000.0}
    found = in_turn({n: lambda n=n, w=w: runner(n, w) for n, w in walls.items()}, 3, 100, lambda line: None)
    assert called == ["a", "b", "slow", "a", "b", "a", "b"]
    assert [len(runs.usages) for runs in found.values()] == [3, 3, 1]
    assert found["a"].wall == 4 and found["a"].peak == 6


def test_the_ratio_is_that_of_runs_of_one_round() -> None:
    """A machine that was three times slower in one of the rounds does not change it."""
    ours = Runs(tuple(Usage(wall, 0, 0) for wall in (1.0, 3.0, 1.0)))
    theirs = Runs(tuple(Usage(wall, 0, 0) for wall in (5.0, 15.0, 5.5)))
    assert theirs.over(ours) == 5.0
    assert ours.walls == "1.0 s (1.0 to 3.0)"
    assert Runs(ours.usages[:1]).walls == "1.0 s"


def test_the_raw_copy_reads_all_and_writes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ft = make_pair("tiny", tmp_path / "pair", ft_tie=False, max_shard_size="100KB")
    monkeypatch.setattr(raw_copy, "PIECE", 4096)
    read: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    raw_copy.main(["--read", str(base), "--read", str(ft), "--write", str(tmp_path / "out"), "--durable"])
    weights = {model: [path.read_bytes() for path in sorted(model.glob("*.safetensors"))] for model in (base, ft)}
    assert len(weights[base]) > 2
    assert (tmp_path / "out").read_bytes() == b"".join(weights[base])
    assert sum(read) == sum(len(part) for parts in weights.values() for part in parts)


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--out", str(tmp_path), "--no-peer", "--runs", "2", "--json", str(tmp_path / "json")]
    assert merge_speed.main([*options, "--only", "task_arithmetic", "model_stock"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    contenders = [*merge_speed.FLOORS, "task_arithmetic, ours", "model_stock, ours"]
    assert [row[0] for row in rows[1:6]] == contenders
    assert {row[1] for row in rows[1:6]} == {"2"}
    assert [row[5] for row in rows[1:2]] == ["1.00"]
    assert {name: len(runs) for name, runs in json.loads((tmp_path / "json").read_text()).items()} == dict.fromkeys(
        contenders, 2
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json", "tiny-tied"]


def test_every_case_is_a_method_and_mergekit_is_told_the_same(tmp_path: Path) -> None:
    assert set(merge_speed.CASES) <= set(METHODS)
    bench = merge_speed.Bench(tmp_path / "m", tmp_path / "out", Path("venv/bin/python"))
    named = bench.contenders(list(merge_speed.CASES))
    assert [name for name in named if name.startswith("fim_ties")] == ["fim_ties, ours"]
    command = bench._theirs("slerp", merge_speed.CASES["slerp"], Path("venv/bin/python"))
    assert command[:1] == ["venv/bin/mergekit-yaml"]
    config = json.loads((tmp_path / "slerp.yaml").read_text())
    assert config["base_model"] == config["models"][0]["model"] == str(tmp_path / "m" / "base")
    assert config["parameters"] == {"t": 0.5} and len(config["models"]) == 2
    assert bench._ours("ties", merge_speed.CASES["ties"])[-9:-4] == ["ties", "--coefficient", "1", "--density", "0.2"]


def test_starting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "commands", lambda folder: {start_up.INTERPRETER: [sys.executable, "-c", "pass"]})
    start_up.main(["--runs", "1"])
    assert f"| `{start_up.INTERPRETER}` | " in capsys.readouterr().out


def test_where_the_time_goes(tmp_path: Path) -> None:
    """In a process of its own: its clock stays where it is put."""
    base, ft = make_pair("tiny", tmp_path / "pair", say=lambda line: None)
    command = [sys.executable, str(Path(where_time_goes.__file__)), "--method", "ties", "--threads", "1"]
    options = ["--base", str(base), "--ft", str(ft), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == ["phase", "calls", "MainThread", "streammerge-hash_0", "streammerge_0", "all"]
    calls = {row[0]: int(row[1]) for row in rows[1:]}
    tensors = 4 * 12 + 2
    assert calls["apply"] == calls["convert"] == calls["pass _Narrow"] == tensors  # one tile each
    assert calls["read"] >= 2 * tensors and calls["write"] == tensors + 1  # the header
    assert calls["hash"] >= 1 and calls["read back"] >= tensors
    assert not (tmp_path / "out").exists()


def test_the_clock_counts_what_is_called_inside_only_once() -> None:
    clock = where_time_goes.Clock()
    inner = clock.timed(lambda: time.sleep(0.02), "inner")
    outer = clock.timed(lambda: [inner(), inner()], "outer")
    start = time.perf_counter()
    outer()
    whole = time.perf_counter() - start
    (times,) = clock.threads.values()
    assert (times["inner"][2], times["outer"][2]) == (2, 1)
    assert 0.04 <= times["inner"][0] < times["inner"][0] + times["outer"][0] <= whole


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--smallest", "tiny", "--largest", "tiny", "--experts-shape", "tiny", "--experts", "1", "3"]
    files = ["--json", str(tmp_path / "json"), "--plot", str(tmp_path / "plot.svg"), "--out", str(tmp_path / "out")]
    assert scaling.main([*options, *files, "--methods", "task_arithmetic", "--runs", "1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows] == [
        ["method", "parameters"],
        ["task_arithmetic", "0.00B"],
        ["raw", "0.00B"],
        ["method", "experts"],
        *[["task_arithmetic", "1"], ["task_arithmetic", "3"], ["raw", "1"], ["raw", "3"]],
    ]
    assert [row[4] for row in rows if row[0] == "raw"] == ["1.00"] * 3
    points = json.loads((tmp_path / "json").read_text())
    assert points["parameters"][0]["parameters"] == scaling.parameters("tiny")
    assert points["left_out"] == []
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_size_that_does_not_fit_the_disk_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    needed = 3 * 2 * scaling.parameters("tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed, 0, needed))
    options = ["--smallest", "tiny", "--largest", "tiny", "--experts-shape", "tiny", "--out", str(tmp_path)]
    assert scaling.main([*options, "--runs", "1"]) == 0
    assert capsys.readouterr().out.count("the disk is too small") == 2


def test_the_parameters_are_those_that_are_written(tmp_path: Path) -> None:
    base, _ = make_pair("tiny", tmp_path / "pair", say=lambda line: None)
    with Checkpoint.open(base) as checkpoint:
        assert scaling.parameters("tiny") == sum(info.numel for info in checkpoint.tensors.values())
    assert 0.09e9 < scaling.parameters("0.1b") < 0.11e9
