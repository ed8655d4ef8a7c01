"""What a merge needs of disk and memory, against what it writes; and that it is refused before the first byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Models, Run, content, edit_config, write_text

import streammerge
from streammerge.checkpoints import disk_space
from streammerge.checkpoints.disk_space import allocated
from streammerge.checkpoints.output import WORK_DIR
from streammerge.errors import MemoryBudgetError, TransferError
from streammerge.needs import merge_needs


def recipe(models: Models, method: str = "task_arithmetic", **values: Any) -> dict[str, Any]:
    return {"base": str(models.base), "models": [str(models.ft)], "method": method, **values}


def needs(models: Models, out: Path, method: str = "task_arithmetic", **options: Any) -> dict[str, tuple[int, int]]:
    with streammerge.plan(recipe(models, method, **options.pop("recipe", {}))) as plan:
        return {need.what: (need.size, need.there) for need in merge_needs(plan, out, **options)}


def no_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: free)


@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_the_output_is_planned_to_the_byte_and_the_rest_above(models: Models, tmp_path: Path, size: str) -> None:
    planned = needs(models, tmp_path / "out", recipe={"max_shard_bytes": size})
    streammerge.merge(recipe(models, max_shard_bytes=size), tmp_path / "out")
    files = {path: path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = sum(size for path, size in files.items() if path.suffix == ".safetensors")
    assert planned["output"] == (weights, 0)
    assert sum(files.values()) - weights < planned["journal and other files"][0]


def test_a_fisher_and_its_scratch(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that lies there at any time is what is planned, but for the journal."""
    from streammerge.fisher.walk import Walk

    most = 0
    plain = Walk._backward

    def watched(self: Walk, *arguments: Any) -> None:
        nonlocal most
        plain(self, *arguments)
        folder = self.state.folder.parent
        unnamed = self._recall._end if self._recall is not None else 0
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "journal")
        most = max(most, written + unnamed)

    monkeypatch.setattr(Walk, "_backward", watched)
    settings = {"fisher": {"samples": 8, "length": 64}}
    size, _ = needs(models, tmp_path / "out", "fim_ties", recipe=settings)["Fisher"]
    streammerge.merge(recipe(models, "fim_ties", **settings), tmp_path / "out", device="cpu")
    assert 0.8 * size < most < 1.1 * size


def test_calibration_store_is_planned(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    text = write_text(models, tmp_path)
    settings = {"text": text[1], "samples": 4, "length": 16}
    size, _ = needs(models, tmp_path / "out", "regmean", recipe={"calibration": settings})["calibration"]
    stored = []
    plain = streammerge.merge.__globals__["_write"]

    def watched(*arguments: Any) -> Any:
        stored.append(allocated(tmp_path / "out" / WORK_DIR / "calibration"))
        return plain(*arguments)

    monkeypatch.setitem(streammerge.merge.__globals__, "_write", watched)
    streammerge.merge(recipe(models, "regmean", calibration=settings), tmp_path / "out", device="cpu")
    assert 0 < stored[0] <= size


@pytest.mark.parametrize("method", ["task_arithmetic", "fim_ties"])
def test_a_full_disk_is_told_before_the_first_byte(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, method: str
) -> None:
    arguments = ("--base", models.base, "--ft", models.ft, "-m", method, "--out", tmp_path / "out", "--device", "cpu")
    needed = sum(size for size, _ in needs(models, tmp_path / "out", method).values())
    before = content(tmp_path)
    no_room(monkeypatch, needed - 1)
    result = run("merge", *arguments, "-q")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("streammerge: error: not enough disk: ")
    assert "output 22 KB" in result.err or "output 2" in result.err
    assert "choose another --out" in result.err
    assert result.err.count("\n") == 1
    assert content(tmp_path) == before
    assert "NOT ENOUGH" in run("plan", *arguments).out
    no_room(monkeypatch, needed)
    assert "NOT ENOUGH" not in run("plan", *arguments).out
    assert run("merge", *arguments, "-q").code == 0


def test_a_fisher_for_which_there_is_no_room(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_room(monkeypatch, 1000)
    with pytest.raises(TransferError, match=r"^not enough disk: .* \(Fisher .*\), 1 KB are free"):
        streammerge.fisher(str(models.base), tmp_path / "fisher", device="cpu")
    assert not (tmp_path / "fisher").exists()
    streammerge.fisher(str(models.base), tmp_path / "fisher", device="cpu", check_disk=False)


def test_who_knows_better_may_go_on(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    no_room(monkeypatch, 1)
    arguments = ("--base", models.base, "--ft", models.ft, "-m", "ties", "--out", tmp_path / "out", "-q")
    assert run("merge", *arguments).code == 1
    assert run("merge", *arguments, "--no-disk-check").code == 0


def test_what_an_unfinished_run_left_is_there(models: Models, tmp_path: Path) -> None:
    """Reserved counts as there, a hole does not; with --overwrite all of it becomes free."""
    out = tmp_path / "out"
    shards = {"max_shard_bytes": "8KB"}
    with streammerge.plan(recipe(models, **shards)) as plan:
        first, second, *_ = plan.shards
    (out / WORK_DIR).mkdir(parents=True)
    (out / WORK_DIR / first.file).write_bytes(bytes(first.size))
    with (out / WORK_DIR / second.file).open("wb") as file:
        file.truncate(second.size)
    size, there = needs(models, out, recipe=shards)["output"]
    assert there == first.size
    fresh = needs(models, out, recipe=shards, overwrite=True)
    assert fresh["output"] == (size, 0)
    assert fresh["unfinished run"] == (0, first.size)


def test_pushed_and_not_kept_two_shards_are_there_at_once(models: Models, tmp_path: Path) -> None:
    shards = {"max_shard_bytes": "3KB"}
    with streammerge.plan(recipe(models, **shards)) as plan:
        sizes = sorted(shard.size for shard in plan.shards)
    assert needs(models, tmp_path, recipe=shards, keep=False)["output"] == (sum(sizes[-2:]), 0)


def test_a_length_that_no_machine_can_hold(models: Models, tmp_path: Path, run: Run) -> None:
    edit_config(models.base, max_position_embeddings=10**7)
    arguments = ("--base", models.base, "--ft", models.ft, "--device", "cpu", "--fisher-length", 10**6)
    before = content(tmp_path)
    result = run("merge", *arguments, "--out", tmp_path / "out", "-q")
    assert (result.code, result.out) == (1, "")
    assert "this merge takes " in result.err
    assert "take fewer or shorter texts (--fisher-samples, --fisher-length)" in result.err
    with pytest.raises(MemoryBudgetError, match="this Fisher pass takes"):
        streammerge.fisher(str(models.base), tmp_path / "fisher", {"length": 10**6}, device="cpu")
    assert content(tmp_path) == before


def test_plan_says_what_is_available(models: Models, run: Run) -> None:
    arguments = ("--base", models.base, "--ft", models.ft, "-m", "ties")
    text = run("plan", *arguments).out
    assert "are available" in text
    assert " are free" in text
    summary = json.loads(run("plan", *arguments, "--json").out)
    assert summary["available_host_bytes"] > 1 << 20
    (room,) = summary["disks"]
    assert room["needed"] > summary["bytes_to_write"]
    assert room["free"] > 0


def test_the_smallest_budget_that_is_named_works_and_less_does_not(models: Models, tmp_path: Path, run: Run) -> None:
    """In MiB, as it is said."""
    from re import search

    def merge(name: str, max_ram: str) -> Any:
        arguments = ("--base", models.base, "--ft", models.ft, "-m", "ties", "--out", tmp_path / name, "-q")
        return run("merge", *arguments, "--max-ram", max_ram)

    refused = merge("small", "1000")
    assert refused.code == 1
    assert "cannot hold one piece of tensor" in refused.err
    named = search(r"give at least (\d+)MiB", refused.err)
    assert named is not None
    assert int(named[1]) == 1 or merge("less", f"{int(named[1]) - 1}MiB").code == 1
    assert merge("named", f"{named[1]}MiB").code == 0
    unlimited = merge("unlimited", "256MiB")
    assert unlimited.code == 0
    shards = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("named", "unlimited")]
    assert shards[0] == shards[1]


def test_plan_says_by_its_status_that_a_merge_would_be_refused(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", "--base", models.base, "--ft", models.ft, "--out", tmp_path / "out")
    assert run(*arguments).code == 0
    with monkeypatch.context() as patch:
        no_room(patch, 1000)
        result = run(*arguments)
        assert result.code == 1 and "NOT ENOUGH" in result.out
    result = run(*arguments, "--fisher-length", "100000000")
    assert result.code == 1 and "MORE THAN THERE CAN BE" in result.out
    assert not (tmp_path / "out").exists()


def test_a_library_call_takes_a_size_as_the_command_line_does(models: Models, tmp_path: Path) -> None:
    whole = streammerge.merge(recipe(models, "task_arithmetic"), tmp_path / "whole", max_ram=96 << 20)
    assert streammerge.merge(recipe(models, "task_arithmetic"), tmp_path / "text", max_ram="96MiB") == whole
