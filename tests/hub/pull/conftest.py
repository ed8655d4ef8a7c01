"""A loopback Hub with a sharded pair, asked by this process or by the command line in one of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from make_checkpoints import make_pair
from tiny_models import Result, content

from streammerge.hub import tries
from streammerge.testing import Hub, User

TOKEN = "hf_markerMarkerMarkerMarkerMarker12"
Run = Callable[..., Result]

# The command line with everything that is logged shown, and the token looked for in it.
_MAIN = "import logging, sys; logging.basicConfig(level=0); from streammerge.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and a fine-tune of it, in five shards each. No test may change them."""
    folder = tmp_path_factory.mktemp("pair")
    base, ft = make_pair("tiny", folder / "m", max_shard_size="100KB", say=lambda line: None)
    (base / "LICENSE").write_text("licence of the base\n")
    (base / "notes").mkdir()
    (base / "notes" / "history.txt").write_text("in a folder\n")
    return base, ft


@pytest.fixture
def hub(pair: tuple[Path, Path]) -> Iterator[Hub]:
    """Private repositories org/base and org/ft, which only the holder of TOKEN may see."""
    with Hub({TOKEN: User("me", organizations=("org",))}) as running:
        for name, folder in zip(("org/base", "org/ft"), pair, strict=True):
            running.add(name, folder)
            running.repositories[name].private = True
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have huggingface_hub in this process talk to the loopback Hub, with an empty cache: its folder."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tries, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(tries, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.CRITICAL)
    yield cache
    close_session()


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Run:
    """`streammerge` in a process of its own, with all logging on: standard error then has that too.

    The token must be nowhere in what it leaves behind. `loud=False`: without logging.
    """

    def run(*arguments: object, loud: bool = False, **environment: str) -> Result:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {
            **hub.environment(),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            **({"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"} if loud else {}),
        }
        start = ["-c", _MAIN] if loud else ["-m", "streammerge"]
        done = subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            env=kept | settings | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        left = [raw for raw in content(tmp_path).values() if raw is not None]
        assert not [raw for raw in (*left, done.stdout.encode(), done.stderr.encode()) if TOKEN.encode() in raw]
        assert not [exchange for exchange in hub.record if TOKEN in exchange.path or TOKEN in exchange.query]
        assert not [
            exchange
            for exchange in hub.record
            if exchange.host == "storage" and TOKEN in (exchange.authorization or "")
        ]
        return Result(done.returncode, done.stdout, done.stderr)

    return run
