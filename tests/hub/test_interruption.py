"""A push that is killed, at any place: the next run uploads nothing twice and makes exactly one commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.pushing import TOKEN, USERS, folder_content, history, pushed, uploads
from interrupted import Processes
from tiny_models import Models

from streammerge.testing import Hub

SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
PLACES = [
    "after prepare",
    *(f"{place} {shard}" for shard in SHARDS for place in ("before upload", "after upload", "after record")),
    *(f"after unlink {shard}" for shard in SHARDS),
    "before commit",
    "after commit",
    "before remove",
    "after remove",
]


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with Hub(USERS) as hub:
        yield hub


@pytest.fixture(scope="module")
def processes(running: Hub, saved_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("processes")
    home = folder / "home"
    environment = running.environment() | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with Processes(saved_models.base, folder) as started:
            yield started


@pytest.fixture
def hub(running: Hub, tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Iterator[Hub]:
    """The Hub without repositories, and an empty cache."""
    running.repositories.clear()
    running.record.clear()
    yield running
    shutil.rmtree(processes.folder / "home" / "assets", ignore_errors=True)


def command(models: Models, *options: object) -> tuple[object, ...]:
    pair = ("--base", models.base, "--ft", models.ft, "-m", "task_arithmetic", "--max-shard-size", "6KB")
    return (*pair, "--threads", 1, "--push-to-hub", "org/new", "-q", *options)


@pytest.mark.parametrize("place", PLACES)
def test_killed_without_an_output_folder(
    hub: Hub, processes: Processes, saved_models: Models, local: dict[str, bytes], place: str
) -> None:
    killed = processes.run(*command(saved_models), at=place)
    assert killed.status == -9, (killed.steps, killed.err)
    committed = "org/new" in hub.repositories and len(history(hub)) == 2
    assert committed == (place in ("after commit", "before remove", "after remove"))
    again = processes.run(*command(saved_models))
    assert again.status == 0, again.err
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert len(uploads(hub)) == len(set(uploads(hub))) == len(SHARDS)
    assert folder_content(processes.folder / "home") == {}


@pytest.mark.parametrize("place", ["after record " + SHARDS[1], "after upload " + SHARDS[3], "after commit", "publish"])
@pytest.mark.parametrize("pull_request", [False, True], ids=["branch", "pull request"])
def test_killed_with_an_output_folder(
    hub: Hub,
    processes: Processes,
    saved_models: Models,
    local: dict[str, bytes],
    tmp_path: Path,
    place: str,
    pull_request: bool,
) -> None:
    options = ("--out", tmp_path / "out", *(["--create-pr"] if pull_request else []))
    killed = processes.run(*command(saved_models, *options), at="before publish" if place == "publish" else place)
    assert killed.status == -9, (killed.steps, killed.err)
    again = processes.run(*command(saved_models, *options))
    assert again.status == 0, again.err
    assert pushed(hub, revision="refs/pr/1" if pull_request else "main") == local == folder_content(tmp_path / "out")
    assert len(history(hub)) == (1 if pull_request else 2)
    assert [*hub.repositories["org/new"].discussions] == ([1] if pull_request else [])
    assert len(uploads(hub)) == len(set(uploads(hub))) == len(SHARDS)


def test_killed_again_and_again(hub: Hub, processes: Processes, saved_models: Models, local: dict[str, bytes]) -> None:
    places = [f"after unlink {shard}" for shard in SHARDS] + ["after commit", "before remove"]
    for place in places:
        assert processes.run(*command(saved_models), at=place).status == -9, place
    assert processes.run(*command(saved_models)).status == 0
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert len(uploads(hub)) == len(set(uploads(hub))) == len(SHARDS)


@pytest.mark.parametrize(
    "place", ["before upload " + SHARDS[1], "after upload " + SHARDS[2], "before commit", "after commit"]
)
def test_a_finished_folder_killed_while_it_is_pushed(
    hub: Hub, processes: Processes, saved_models: Models, local: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    for name, raw in local.items():
        (tmp_path / name).write_bytes(raw)
    arguments = ("push", tmp_path, "org/new", "-q")
    assert processes.run(*arguments, at=place).status == -9
    assert processes.run(*arguments).status == 0
    assert pushed(hub) == local
    assert len(history(hub)) == 2
    assert len(uploads(hub)) == len(set(uploads(hub))) == len(SHARDS)
