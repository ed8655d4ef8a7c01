"""Hub ids, from the command line to the manifest, with the real client against a loopback Hub."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import MATRIX, Models, Result, Run, content, put, tensors

from streammerge.testing import Hub

TOKEN = "hf_markerMarkerMarkerMarkerMarker12"
Merge = Callable[..., Result]


@pytest.fixture
def hub(saved_models: Models) -> Iterator[Hub]:
    with Hub() as running:
        for name, folder in saved_models._asdict().items():
            running.add(f"org/{name}", folder)
        yield running


@pytest.fixture
def merge(hub: Hub, tmp_path: Path) -> Merge:
    """`python -m streammerge` in a process of its own, whose Hub is the loopback one; no token may leak."""

    def call(*arguments: object, **environment: str) -> Result:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-m", "streammerge", *map(str, arguments), "-m", "task_arithmetic"],
            env=kept | settings | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        left = [raw for raw in content(tmp_path).values() if raw is not None]
        assert not [raw for raw in (*left, done.stdout.encode(), done.stderr.encode()) if TOKEN.encode() in raw]
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def assert_refused(result: Result, tmp_path: Path, *words: str) -> None:
    assert (result.code, result.out) == (1, ""), result
    assert result.err.startswith("streammerge: error: ") and result.err.count("\n") == 1, result.err
    assert not [word for word in words if word not in result.err], result.err
    assert not (tmp_path / "out").exists()


def test_hub_ids_give_the_bytes_of_a_local_merge(
    hub: Hub, merge: Merge, saved_models: Models, tmp_path: Path, run: Run
) -> None:
    pair = ("--base", saved_models.base, "--ft", saved_models.ft, "-m", "task_arithmetic", "-q")
    assert run(*pair, "--out", tmp_path / "local").code == 0
    result = merge("--hub-base", "org/base", "--hub-ft", "org/ft", "--out", "out", "-q", "--no-report")
    assert (result.code, result.err) == (0, ""), result.err
    local, out = content(tmp_path / "local"), content(tmp_path / "out")
    assert local.keys() == out.keys()
    assert {name for name in out if local[name] != out[name]} == {"README.md", "streammerge.json"}
    assert run("verify", tmp_path / "out").code == 0

    commits = {name: hub.repositories[name].branches["main"] for name in ("org/base", "org/ft")}
    manifest = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert {source["id"]: source["revision"] for source in manifest["sources"]} == commits
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == ["org/base", "org/ft"]
    assert (metadata["base_model_relation"], metadata["library_name"]) == ("merge", "transformers")
    assert metadata["tags"] == ["merge", "streammerge"]
    assert all(commit in card for commit in commits.values())
    assert {header for _, _, header in hub.requests} == {f"Bearer {TOKEN}"}

    # from the cache, without a server
    again = merge("--base", "org/base", "--ft", "org/ft", "--out", "again", "-q", HF_HUB_OFFLINE="1")
    assert (again.code, again.err) == (0, ""), again.err
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "out").keys()
    manifest = json.loads((tmp_path / "again" / "streammerge.json").read_text())
    assert {source["id"]: source["revision"] for source in manifest["sources"]} == commits


def test_revisions_and_folders_side_by_side(
    hub: Hub, merge: Merge, models: Models, saved_models: Models, tmp_path: Path, run: Run
) -> None:
    put(models.ft, MATRIX, torch.full((32, 16), 0.25))
    commit = hub.add("org/ft", models.ft, "long-thoughts")
    pair = ("--base", saved_models.base, "--ft", models.ft, "-m", "task_arithmetic", "-q")
    assert run(*pair, "--out", tmp_path / "local").code == 0
    for revision, out in (("long-thoughts", "by-branch"), (commit, "by-commit")):
        result = merge("--base", saved_models.base, "--ft", f"org/ft@{revision}", "--out", out)
        assert result.code == 0, result.err
        manifest = json.loads((tmp_path / out / "streammerge.json").read_text())
        assert [(s["id"], s["revision"]) for s in manifest["sources"]] == [
            (str(saved_models.base), None),
            ("org/ft", commit),
        ]
        assert (tmp_path / out / "model.safetensors").read_bytes() == (
            tmp_path / "local" / "model.safetensors"
        ).read_bytes()


def test_a_folder_goes_before_the_hub_unless_told(hub: Hub, merge: Merge, models: Models, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    models.base.rename(tmp_path / "org" / "base")
    models.ft.rename(tmp_path / "org" / "ft")
    result = merge("plan", "--base", "org/base", "--hub-ft", "org/ft", "--json")
    assert result.code == 0, result.err
    asked = {path for _, path, _ in hub.requests}
    assert any("org/ft" in path for path in asked) and not any("org/base" in path for path in asked)


REFUSED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "no repository": (
        ("--hub-base", "org/nowhere", "--ft", "org/ft"),
        ["model org/nowhere: ", "no such repository on the Hub, or no access", "check the spelling", "hf auth login"],
    ),
    "no revision": (("--base", "org/base", "--ft", "org/ft@v9"), ["model org/ft@v9: the repository has no such rev"]),
    "gated": (
        ("--base", "org/base", "--ft", "org/gated"),
        ["model org/gated: gated: ask for access on its page, as whom you are logged in"],
    ),
    "only pickled weights": (
        ("--base", "org/base", "--ft", "org/pickled"),
        ["org/pickled: only pickled weights (pytorch_model.bin)", "from_pretrained('org/pickled'"],
    ),
}


@pytest.mark.parametrize(("pair", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_hub_refuses(
    hub: Hub, merge: Merge, models: Models, tmp_path: Path, pair: tuple[str, ...], words: list[str]
) -> None:
    hub.add("org/gated", models.ft)
    hub.repositories["org/gated"].gated = True
    (models.ft2 / "model.safetensors").rename(models.ft2 / "pytorch_model.bin")
    hub.add("org/pickled", models.ft2)
    assert_refused(merge(*pair, "--out", "out", "-q"), tmp_path, *words)


def test_a_hub_out_of_reach(merge: Merge, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = merge("--base", "org/base", "--ft", "org/ft", "--out", "out", HF_ENDPOINT=nobody)
    assert_refused(result, tmp_path, "model org/base: not in the local cache, and the Hub cannot be reached")


def test_offline_without_a_cache(hub: Hub, merge: Merge, tmp_path: Path) -> None:
    result = merge("--base", "org/base", "--ft", "org/ft", "--out", "out", HF_HUB_OFFLINE="1")
    assert_refused(result, tmp_path, "model org/base: not in the local cache, and the Hub cannot be reached (offline?)")
    assert hub.requests == []
