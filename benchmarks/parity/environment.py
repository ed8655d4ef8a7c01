"""mergekit in a virtual environment of its own: its pins are not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

MERGEKIT, TORCH = "0.1.5", "2.13.0"
PEER = Path(__file__).with_name("peer.py")
READY = ".ready"  # made last: an environment without it is begun again


class EnvironmentFailure(Exception):  # noqa: N818 - not an error of ours
    """mergekit cannot be had; the message says why and what to do."""


class PeerRefused(Exception):  # noqa: N818 - an answer like any other
    """mergekit raised an exception; the message is its own."""


def make_environment(folder: Path) -> Path:
    """The Python of an environment with mergekit in it; made where it is not there yet.

    Raises:
        EnvironmentFailure: it could not be made, for instance without a network.
    """
    python = folder / "bin" / "python"
    if (folder / READY).exists():
        return python
    print(f"making {folder}: mergekit {MERGEKIT}, torch {TORCH}, from the package index", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], folder)
    _run([*pip, f"torch=={TORCH}"], folder)
    _run([*pip, f"mergekit=={MERGEKIT}"], folder)
    (folder / READY).touch()
    return python


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise EnvironmentFailure(
            f"cannot make {folder} with mergekit {MERGEKIT} ({said[-1].strip() if said else 'no reason given'}): this "
            "needs a package index, so connect to the network once, or name the Python of an environment that has it "
            "with --peer-python"
        )


class Peer:
    """mergekit, ready to merge, in its own process.

    Args:
        python: of an environment that has mergekit.
        log: gets what it prints.

    Attributes:
        versions: of its Python and packages.
    """

    versions: dict[str, str]

    def __init__(self, python: Path, log: Path) -> None:
        self.python, self.log = python, log

    def __enter__(self) -> Self:
        command = [str(self.python), "-P", str(PEER)]  # -P: modules are not looked for beside the script
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            try:
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
            except OSError as error:
                raise EnvironmentFailure(f"cannot start {self.python}: {error.strerror}") from None
        try:
            self.versions = self._answer()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def merge(self, config: Mapping[str, Any], out: Path, seed: int | None = None) -> None:
        """One merge, as by `mergekit-yaml`.

        Raises:
            PeerRefused: mergekit's own exception.
        """
        with suppress(BrokenPipeError):  # it ended: the missing answer says so
            print(json.dumps({"config": config, "out": str(out), "seed": seed}), file=self._pipe("stdin"), flush=True)
        if error := self._answer()["error"]:
            raise PeerRefused(error)

    def _answer(self) -> Any:
        line = self._pipe("stdout").readline()
        if not line:
            said = self.log.read_text().strip().splitlines()
            raise EnvironmentFailure(
                f"{self.python}, which should run mergekit, ended: {said[-1] if said else 'no reason given'}"
            )
        return json.loads(line)

    def _close(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe("stdin").close()
        self._process.wait()
        self._pipe("stdout").close()

    def _pipe(self, name: str) -> IO[str]:
        pipe: IO[str] | None = getattr(self._process, name)
        assert pipe is not None  # both were asked for
        return pipe
