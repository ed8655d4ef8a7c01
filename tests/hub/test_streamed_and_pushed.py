"""From the Hub to the Hub, in processes of their own: by byte ranges in, by LFS or Xet out, and what stays secret."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.pushing import TOKEN, USERS, folder_content, history, pushed, sampled
from tiny_models import Models, Run

from streammerge.testing import Armed, Fault, Hub

LOUD = """
import logging, sys
logging.basicConfig(level=1, filename=sys.argv.pop(1))
from streammerge.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
Start = Callable[..., Any]


@pytest.fixture
def hub(saved_models: Models) -> Iterator[Hub]:
    """The models in private repositories."""
    with Hub(USERS) as running:
        for name, folder in saved_models._asdict().items():
            running.add(f"org/{name}", folder)
            running.repositories[f"org/{name}"].private = True
        yield running


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Start:
    """`streammerge` with everything logged, into `tmp_path / "log"`."""

    def call(*arguments: object, wait: bool = True, **environment: str) -> Any:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = hub.environment() | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", LOUD, "log", *map(str, arguments)],
            env=kept | settings | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return process
        return subprocess.CompletedProcess(process.args, *_ended(process))

    return call


def _ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


SHARDED = ("--max-shard-size", "6KB", "-q")
PAIR = ("--base", "org/base", "--ft", "org/ft", "--hub-mode", "stream", *SHARDED)
ROOM = {False: (), True: ("--max-ram", "512MiB")}  # for Xet


@pytest.fixture
def local(saved_models: Models, tmp_path: Path, run: Run) -> Callable[..., dict[str, bytes]]:
    """The weights of the same merge of local folders."""

    def call(*options: object) -> dict[str, bytes]:
        out = tmp_path / "local"
        result = run("--base", saved_models.base, "--ft", saved_models.ft, *SHARDED, "--out", out, *options)
        assert result.code == 0, result.err
        return {name: raw for name, raw in folder_content(out).items() if ".safetensors" in name}

    return call


def weights(hub: Hub) -> dict[str, bytes]:
    return {name: raw for name, raw in pushed(hub).items() if ".safetensors" in name}


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_fim_ties_by_byte_ranges_in_and_shard_by_shard_out(
    hub: Hub, start: Start, local: Callable[..., dict[str, bytes]], tmp_path: Path, xet: bool
) -> None:
    hub.misbehave(Fault("stall", path="/upload/*", seconds=0.05, times=None))
    planned = start("plan", *PAIR[:-1], "--device", "cpu", "--json")
    assert planned.returncode == 0, planned.stderr
    announced = json.loads(planned.stdout)["from_hub"]["total"]
    hub.record.clear()

    command = (*PAIR, *ROOM[xet], "--device", "cpu", "--push-to-hub", "org/new")
    result, seen = sampled(tmp_path, lambda: start(*command, HF_HUB_DISABLE_XET="0" if xet else "1"))
    assert result.returncode == 0, result.stderr
    assert weights(hub) == local("--device", "cpu")
    assert history(hub) == ["Upload a merge by fim_ties", "initial commit"]
    assert max(map(len, seen)) == 2 and len(set().union(*seen)) > 3
    kinds = {e.endpoint for e in hub.record}
    assert ("xorb-upload" in kinds, "upload" in kinds) == (xet, not xet)
    read = sum(e.served for e in hub.record if "/org/new" not in e.path and e.method == "GET")
    assert abs(read - announced) <= announced / 100
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(("room", "way"), [("375MiB", "upload"), ("376MiB", "xorb-upload")])
def test_xet_is_used_where_the_budget_has_room_for_it(hub: Hub, start: Start, room: str, way: str) -> None:
    """280 MiB for Xet, and 96 MiB for the merge; whatever is used, `plan` says so."""
    arguments = (*PAIR[:-1], "-m", "task_arithmetic", "--max-ram", room, "--push-to-hub", "org/new")
    planned = start("plan", *arguments, "--json", HF_HUB_DISABLE_XET="0")
    said = json.loads(planned.stdout)["transfers"]
    assert (said["by"], said["ram_for_xet"]) == ({"upload": "http", "xorb-upload": "xet"}[way], 376 << 20)
    assert start(*arguments, HF_HUB_DISABLE_XET="0").returncode == 0
    assert {e.endpoint for e in hub.record} & {"upload", "xorb-upload"} == {way}


def stopped(process: Any, stalled: Armed, number: int) -> None:
    """Send the signal once the Hub keeps the process waiting; the one line that it leaves."""
    while not stalled.struck:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number, err
    assert err == "streammerge: stopped; the same command goes on where it was\n"


@pytest.mark.parametrize(("xet", "number"), [(False, signal.SIGTERM), (True, signal.SIGINT)], ids=["LFS", "Xet"])
def test_a_signal_does_not_wait_for_an_upload(hub: Hub, start: Start, xet: bool, number: int) -> None:
    stalled = hub.misbehave(Fault("stall", path="*xorb*" if xet else "/upload/*", seconds=60, times=None))
    arguments = (*PAIR, *ROOM[xet], "-m", "task_arithmetic", "--push-to-hub", "org/new")
    stopped(start(*arguments, HF_HUB_DISABLE_XET="01"[not xet], wait=False), stalled, number)
    hub.behave()
    assert start(*arguments, HF_HUB_DISABLE_XET="01"[not xet]).returncode == 0
    assert len(history(hub)) == 2


@pytest.mark.parametrize(("mode", "number"), [("cache", signal.SIGINT), ("stream", signal.SIGTERM)])
def test_a_signal_does_not_wait_for_a_download(
    hub: Hub, start: Start, local: Callable[..., dict[str, bytes]], tmp_path: Path, mode: str, number: int
) -> None:
    stalled = hub.misbehave(Fault("stall", path="/download/*", seconds=60, times=None, after=6))
    arguments = (*PAIR, "--hub-mode", mode, "-m", "task_arithmetic", "--out", "out")
    stopped(start(*arguments, HF_HUB_DISABLE_XET="1", wait=False), stalled, number)
    hub.behave()
    assert start(*arguments, HF_HUB_DISABLE_XET="1").returncode == 0
    written = {name: raw for name, raw in folder_content(tmp_path / "out").items() if ".safetensors" in name}
    assert written == local("-m", "task_arithmetic")


def test_killed_when_all_is_uploaded_by_xet(hub: Hub, start: Start, local: Callable[..., dict[str, bytes]]) -> None:
    committing = hub.misbehave(Fault("stall", path="*/commit/*", seconds=60))
    arguments = (*PAIR, *ROOM[True], "-m", "task_arithmetic", "--push-to-hub", "org/new")
    process = start(*arguments, HF_HUB_DISABLE_XET="0", wait=False)
    while not committing.struck:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    sent = hub.traffic()["xorb-upload"]
    assert start(*arguments, HF_HUB_DISABLE_XET="0").returncode == 0
    assert hub.traffic()["xorb-upload"] == sent
    assert weights(hub) == local("-m", "task_arithmetic") and len(history(hub)) == 2


@pytest.mark.parametrize("way", ["pushed", "refused", "stopped"])
@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_the_token_is_nowhere(hub: Hub, start: Start, tmp_path: Path, way: str, xet: bool) -> None:
    if way == "refused":
        hub.misbehave(Fault("status", path="*/commit/*", status=400, times=None))
    elif way == "stopped":
        hub.misbehave(Fault("status", path="*/preupload/*", status=403, times=None, after=1))
    loud = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "debug", "HF_HUB_DISABLE_XET": "01"[not xet]}
    options = ("-m", "task_arithmetic", "--push-to-hub", "org/new", "--private", "--debug")
    result = start(*PAIR, *ROOM[xet], *options, **loud)
    assert result.returncode == (0 if way == "pushed" else 1), result.stderr
    if way != "pushed":
        assert "Traceback" in result.stderr
    assert len((tmp_path / "log").read_text()) > 10_000
    secret = TOKEN.encode()
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path, raw in left.items() if secret in raw] == []
    assert TOKEN not in result.stdout + result.stderr
    assert [path for path in hub.folder.rglob("*") if path.is_file() and secret in path.read_bytes()] == []
    assert not [e for e in hub.record if TOKEN in e.path + e.query]
    assert not [e for e in hub.record if e.host == "storage" and TOKEN in (e.authorization or "")]
    assert any(e.authorization == f"Bearer {TOKEN}" for e in hub.record)
