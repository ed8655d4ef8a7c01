"""Whole commands on models of the loopback Hub, in processes of their own: bytes, traffic, files, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.pull.conftest import TOKEN, Run
from make_checkpoints import SHAPES, make_pair
from tiny_models import Result, content
from tiny_models import Run as InProcess

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.testing import Fault, Hub

PAIR = ("--base", "org/base", "--ft", "org/ft")
OURS = {"README.md", "streammerge.json"}  # what names the inputs
Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def merged(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FIM-TIES makes of the pair in its folders."""
    from streammerge.cli import main

    out = tmp_path_factory.mktemp("merged") / "local"
    assert main(["--base", str(pair[0]), "--ft", str(pair[1]), "--out", str(out), "-q", *SHARDS]) == 0
    return out


SHARDS = ("--max-shard-size", "120KB", "--device", "cpu")


def files(out: Path) -> dict[str, bytes | None]:
    """All of a merge but its report, which no two runs share."""
    return {name: raw for name, raw in content(out).items() if name != "report.html"}


def assert_same(out: Path, merged: Path) -> None:
    found, expected = files(out), files(merged)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= OURS
    manifests = [json.loads((folder / "streammerge.json").read_text()) for folder in (out, merged)]
    prints = [[source["fingerprint"] for source in manifest["sources"]] for manifest in manifests]
    assert prints[0][:2] == prints[1][:2]


def served(hub: Hub) -> int:
    """Body bytes of everything; redirects have none."""
    return sum(exchange.served for exchange in hub.record)


def planned(call: Run, *options: object, **environment: str) -> dict[str, Any]:
    result = call("plan", *PAIR, *options, "--json", **environment)
    assert (result.code, result.err) == (0, ""), result.err
    return json.loads(result.out)


def nowhere(folder: Path) -> dict[str, str]:
    """A home that cannot even be made: a folder below a file. (A read-only one would not stop root.)"""
    (folder / "file").write_text("")
    home = str(folder / "file" / "home")
    return {"HF_HOME": home, "HOME": home, "XDG_CACHE_HOME": home}


def assert_refused(result: Result, *words: str) -> None:
    assert (result.code, result.out) == (1, ""), result
    assert result.err.startswith("streammerge: error: ") and result.err.count("\n") == 1, result.err
    assert not [word for word in words if word not in result.err], result.err


@pytest.mark.parametrize("mode", ["cache", "stream"])
def test_a_plan_fetches_headers_index_and_config_without_a_home(
    call: Run, hub: Hub, pair: Pair, tmp_path: Path, mode: str
) -> None:
    summary = planned(call, "--hub-mode", mode, "--device", "cpu", **nowhere(tmp_path))
    files = hub.traffic("file")
    small = weight_headers = 0
    for name, folder in zip(("org/base", "org/ft"), pair, strict=True):
        small += sum((folder / file).stat().st_size for file in ("config.json", "model.safetensors.index.json"))
        with Checkpoint.open(folder) as model:
            firsts: dict[str, int] = {}
            for info in model.tensors.values():
                firsts[info.file] = min(info.start, firsts.get(info.file, info.start))
            weight_headers += sum(firsts.values())
            assert {file for file in files if file.startswith(name)} == {
                f"{name}/{file}" for file in ("config.json", "model.safetensors.index.json", *firsts)
            }
    assert weight_headers <= sum(t.served for t in files.values()) - small <= 1.25 * weight_headers
    assert summary["from_hub"]["opened"] == served(hub)
    assert set(hub.traffic()) == {"info", "resolve", "download"}
    assert content(tmp_path) == {"file": b""}


def test_what_a_stream_merge_reads_is_what_plan_says(call: Run, hub: Hub, merged: Path, tmp_path: Path) -> None:
    options = ("--hub-mode", "stream", *SHARDS)
    home = nowhere(tmp_path)
    announced = planned(call, *options[:-2], "--device", "cpu", **home)["from_hub"]
    assert announced["at_most"] is False
    assert min(announced[key] for key in ("fisher", "survey", "merge", "fingerprints", "files", "opened")) > 0
    assert announced["downloads"] == announced["calibration"] == 0
    hub.record.clear()
    result = call(*PAIR, "--out", "out", "-q", *options, **home)
    assert (result.code, result.err) == (0, ""), result.err
    assert served(hub) == pytest.approx(announced["total"], rel=0.01)
    assert_same(tmp_path / "out", merged)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}, "of the inputs, nothing on disk"
    manifest = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    commits = [hub.repositories[name].branches["main"] for name in ("org/base", "org/ft")]
    assert [source["revision"] for source in manifest["sources"]][:2] == commits
    assert [source["id"] for source in manifest["sources"]][:2] == ["org/base", "org/ft"]


def test_several_passes_read_no_more_than_plan_says(call: Run, hub: Hub, tmp_path: Path) -> None:
    """An embedding larger than the buffer."""
    shape = replace(SHAPES["tiny"], vocab_size=1 << 13)
    for name, folder in zip(("org/base", "org/ft"), make_pair(shape, tmp_path / "wide"), strict=True):
        hub.add(name, folder)
    options = ("--hub-mode", "stream", "-m", "ties", "--max-ram", "14MiB", "--threads", "1")
    plenty = planned(call, *options[:4])["from_hub"]
    announced = planned(call, *options)["from_hub"]
    assert announced["at_most"] and announced["merge"] > plenty["merge"]
    hub.record.clear()
    result = call(*PAIR, "--out", "out", "-q", *options)
    assert result.code == 0, result.err
    assert plenty["total"] < served(hub) <= announced["total"]


def test_everything_logged_and_the_token_nowhere(call: Run, merged: Path, tmp_path: Path) -> None:
    for mode in ("stream", "cache"):
        result = call(*PAIR, "--out", mode, "--hub-mode", mode, *SHARDS, loud=True)
        assert result.code == 0, result.err
        assert "httpx2" in result.err and "authenticated: True" in result.err, "it is loud"
        assert_same(tmp_path / mode, merged)


def test_through_the_cache_and_then_without_a_hub(
    call: Run, hub: Hub, pair: Pair, merged: Path, tmp_path: Path
) -> None:
    announced = planned(call)["from_hub"]
    weights = sum(file.stat().st_size for folder in pair for file in folder.glob("*.safetensors"))
    assert (announced["downloads"], announced["merge"], announced["at_most"]) == (weights, 0, False)
    hub.record.clear()
    result = call(*PAIR, "--out", "out", "-q", *SHARDS)
    assert (result.code, result.err) == (0, ""), result.err
    assert_same(tmp_path / "out", merged)
    # the tokenizer and the config of both besides; the config and the index twice
    assert served(hub) == pytest.approx(announced["total"], rel=0.03)
    fetched = [e.file for e in hub.record if e.status == 200 and (e.file or "").endswith(".safetensors")]
    shards = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    assert sorted(fetched) == [f"org/{name}/{shard}" for name in ("base", "ft") for shard in shards], "each once"
    hub.record.clear()
    again = call(*PAIR, "--out", "again", "-q", *SHARDS, HF_HUB_OFFLINE="1")
    assert (again.code, again.err) == (0, ""), again.err
    assert_same(tmp_path / "again", merged)
    assert hub.record == []
    assert planned(call)["from_hub"]["downloads"] == 0


def test_a_branch_that_moves_meanwhile(call: Run, hub: Hub, merged: Path, tmp_path: Path) -> None:
    commit = hub.repositories["org/base"].branches["main"]
    spoilt = {"config.json": b"{}", "LICENSE": b"none", "model-00002-of-00005.safetensors": b"other"}
    hub.misbehave(Fault("moved_branch", path="/org/base/resolve/*", after=1, files=spoilt))
    result = call(*PAIR, "--out", "out", "-q", "--hub-mode", "stream", *SHARDS)
    assert (result.code, result.err) == (0, ""), result.err
    assert hub.repositories["org/base"].branches["main"] != commit
    assert {e.path.split("/")[4] for e in hub.record if e.path.startswith("/org/base/resolve/")} == {commit}
    assert_same(tmp_path / "out", merged)


def test_the_sources_of_a_merge_are_those_of_its_commit(call: Run, hub: Hub, tmp_path: Path) -> None:
    """The branch moved since; what is compared with is at the commit that was merged."""
    commit = hub.repositories["org/base"].branches["main"]
    spoilt = {"config.json": b"{}", "model-00002-of-00005.safetensors": b"other"}
    hub.misbehave(Fault("moved_branch", path="/org/base/resolve/*", after=1, files=spoilt))
    result = call(*PAIR, "-m", "ties", "--out", "out", "-q", "--hub-mode", "stream", *SHARDS)
    assert (result.code, result.err) == (0, ""), result.err
    assert hub.repositories["org/base"].branches["main"] != commit
    hub.record.clear()
    result = call("verify", "out", "--sources", "--sample", "all", "-q", "--hub-mode", "stream")
    assert (result.code, result.err) == (0, ""), result.err
    assert result.out.endswith("merged again from the sources: identical\n")
    assert {e.path.split("/")[4] for e in hub.record if e.path.startswith("/org/base/resolve/")} == {commit}


def test_a_transfer_that_fails_for_good_and_the_next_run_in_the_other_mode(
    call: Run, hub: Hub, merged: Path, tmp_path: Path
) -> None:
    third = "model-00003-of-00005.safetensors"
    command = (*PAIR, "--out", "out", "-q", *SHARDS)
    path = f"/download/org/ft/*/{third}"
    hub.misbehave(Fault("expired", path=path, after=6, times=None))
    result = call(*command, "--hub-mode", "stream")
    assert_refused(result, f"model org/ft, file {third}, bytes ", "a signed address was refused", "run again to go on")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    hub.behave()
    result = call(*command, "--hub-mode", "cache")
    assert (result.code, result.err) == (0, ""), result.err
    assert_same(tmp_path / "out", merged)


def test_a_fisher_and_a_diagnosis_streamed(call: Run, pair: Pair, tmp_path: Path, run: InProcess) -> None:
    assert run("fisher", "--base", pair[0], "--out", tmp_path / "local", "--device", "cpu", "-q").code == 0
    result = call("fisher", "--base", "org/base", "--hub-mode", "stream", "--out", "stream", "--device", "cpu", "-q")
    assert (result.code, result.err) == (0, ""), result.err
    found, expected = files(tmp_path / "stream"), files(tmp_path / "local")
    assert {name for name in expected if found[name] != expected[name]} == {"fisher.json"}
    texts = []
    for by, base, ft in ((run, *pair), (call, "org/base", "org/ft")):
        result = by("diagnose", ft, "--against", base, "--hub-mode", "stream", "--device", "cpu", "--json", "-q")
        assert (result.code, result.err) == (0, ""), result.err
        texts.append({key: v for key, v in json.loads(result.out).items() if key not in ("model", "against")})
    assert texts[0] == texts[1]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("method", ["acm_ties", "regmean"])
def test_calibrations_streamed(call: Run, hub: Hub, pair: Pair, tmp_path: Path, run: InProcess, method: str) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    options = ("-m", method, "--calibration", text, "--calibration-samples", 4, "--calibration-length", 16)
    local = run("--base", pair[0], "--ft", pair[1], "--out", tmp_path / "local", "-q", *options, "--device", "cpu")
    assert local.code == 0, local.err
    announced = planned(call, *options, "--hub-mode", "stream")["from_hub"]
    assert announced["at_most"] and announced["calibration"] > 0
    hub.record.clear()
    result = call(*PAIR, "--out", "out", "-q", *options, "--device", "cpu", "--hub-mode", "stream")
    assert (result.code, result.err) == (0, ""), result.err
    rows = 2 * 64 * 128  # of embeddings at most, for both models
    assert announced["total"] * 0.99 - rows <= served(hub) <= announced["total"]
    found, expected = files(tmp_path / "out"), files(tmp_path / "local")
    assert {name for name in expected if found[name] != expected[name]} == OURS


def test_models_in_xet(call: Run, hub: Hub, pair: Pair, merged: Path, tmp_path: Path) -> None:
    """Uploaded and downloaded by Xet; and streamed, by ranges of plain HTTP."""
    for name, folder in (("org/xet-base", pair[0]), ("org/xet-ft", pair[1])):
        code = "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo(sys.argv[1])\n"
        code += "api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
        command = [sys.executable, "-c", code, name, str(folder)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        client = {**hub.environment(), "HF_HOME": str(tmp_path / "uploads"), "HF_TOKEN": TOKEN}
        subprocess.run(command, env=kept | client, check=True, capture_output=True, timeout=120)
    for mode, endpoint in (("cache", "xorb-download"), ("stream", "download")):
        hub.record.clear()
        models = ("--base", "org/xet-base", "--ft", "org/xet-ft", "--hub-mode", mode)
        result = call(
            *models, "--out", mode, "-q", *SHARDS, HF_HUB_DISABLE_XET="0", HF_HOME=str(tmp_path / f"home-{mode}")
        )
        assert (result.code, result.err) == (0, ""), result.err
        assert hub.traffic()[endpoint].requests > 5
        assert ("xorb-download" in hub.traffic()) is (mode == "cache")
        assert_same(tmp_path / mode, merged)


def test_the_base_itself_under_another_name_is_noted(call: Run) -> None:
    """By its commit; that of the fine-tune is another."""
    result = call(
        "plan", "--base", "org/base", "--ft", "hf://org/base@main", "--ft", "org/ft", "--json", "-m", "linear"
    )
    assert json.loads(result.out)["notes"] == [
        "org/base: is the base itself: its task vector is 0, and a mean of all models counts it twice"
    ]
