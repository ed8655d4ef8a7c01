"""The command line in processes of their own that are killed at chosen places.

`python tests/interrupted.py` reads jobs, one JSON object a line, and runs each in a fork of itself: torch and
transformers are imported once instead of once per process. The fork writes down every step it comes by, and sends
itself a signal at the one that the job names.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended: exit status (negative: the signal that killed it), steps it came by, standard error."""

    status: int
    steps: list[str]
    err: str


class Processes:
    """Starts processes. Use as a context manager.

    Args:
        base: a model to warm up with.
        folder: an empty one, for that and for what they print.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, __file__, str(base), str(folder / "warm")]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        *arguments: object,
        at: str | int | None = None,
        signal: int = signal.SIGKILL,
        sync_seconds: float = 2.0,
        threads: int = 1,
    ) -> Ended:
        """Run the command line.

        Args:
            at: the step at which the signal is sent: "before ..." or "after ...", as `Ended.steps` names them, or the
                number of the step.
            sync_seconds: how often what is complete is recorded besides.
            threads: workers of a Fisher pass.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        log, err = self.folder / "log", self.folder / "err"
        job = {"arguments": [str(a) for a in arguments], "at": at, "signal": signal, "log": str(log), "err": str(err)}
        print(json.dumps(job | {"sync": sync_seconds, "threads": threads}), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return Ended(status, log.read_text().splitlines(), err.read_text())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def _serve() -> None:
    import streammerge.engine  # noqa: F401 - imported before the forks
    from streammerge.cli import main

    with redirect_stdout(StringIO()):  # much of transformers is imported by the first use
        main(["fisher", "--base", sys.argv[1], "--out", sys.argv[2], "--device", "cpu", "-q"])
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(job)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(job: dict[str, Any]) -> None:
    """Run one job; never returns."""
    code = 99
    try:
        for number, path in ((1, os.devnull), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        import torch

        from streammerge.checkpoints import writer
        from streammerge.cli import main

        torch.set_num_threads(job["threads"])
        writer.SYNC_SECONDS = job["sync"]
        _watch(_Steps(job))
        code = main(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # the fork must not go on as a server
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


class _Steps:
    """Writes every step down before it is taken and after, and sends the signal at one of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._at, self._signal = job["at"], job["signal"]
        self._log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._seen: Counter[str] = Counter()
        self._lock = Lock()
        self._count = 0

    def pass_by(self, step: str) -> None:
        with self._lock:
            self._seen[step] += 1
            self._count += 1
            if self._seen[step] > 1:
                step = f"{step} #{self._seen[step]}"
            os.write(self._log, f"{step}\n".encode())
            if self._at in (step, self._count):
                os.kill(os.getpid(), self._signal)


def _watch(steps: _Steps) -> None:
    from streammerge.checkpoints import disk
    from streammerge.checkpoints.work import WorkFolder
    from streammerge.checkpoints.writer import CheckpointWriter
    from streammerge.fisher.feed import BlockFeed
    from streammerge.fisher.measure import _FisherSink
    from streammerge.fisher.state import WalkState
    from streammerge.fisher.walk import Walk
    from streammerge.hub.commit import Commit
    from streammerge.hub.ledger import Ledger
    from streammerge.hub.target import HubTarget

    watched: list[tuple[Any, str, Callable[..., str]]] = [
        (BlockFeed, "_read", lambda self, index, raw: f"read {index}"),
        (Walk, "_forward", lambda self, feed, index, *rest: f"forward {index}"),
        (Walk, "_head", lambda self, *rest: "head"),
        (Walk, "_backward", lambda self, feed, index, *rest: f"backward {index}"),
        (Walk, "_outside", lambda self, *rest: "outside"),
        (WalkState, "save", lambda self, kind, index, tensors: f"save {kind}-{index}"),
        (WalkState, "forget", lambda self, kind, index: f"forget {kind}-{index}"),
        (_FisherSink, "write", lambda self, name, start, values: f"write {name} {start}"),
        (_FisherSink, "done", lambda self, name, reached=True: f"done {name}"),
        (_FisherSink, "sync", lambda self: "sync"),
        (CheckpointWriter, "publish", lambda self, files: "publish"),
        (HubTarget, "prepare", lambda self: "prepare"),
        (HubTarget, "upload", lambda self, name, file: f"upload {name}"),
        (Ledger, "add", lambda self, file, size, sha256: f"record {file}"),
        (disk, "remove", lambda path: f"unlink {path.name}"),
        (Commit, "_ask", lambda self: "commit"),
        (WorkFolder, "remove", lambda self: "remove"),
        (os, "replace", lambda source, target: f"replace {Path(target).name}"),
        (os, "fsync", lambda fd: "fsync"),
    ]
    for owner, name, describe in watched:
        _wrap(owner, name, describe, steps)


def _wrap(owner: Any, name: str, describe: Callable[..., str], steps: _Steps) -> None:
    plain = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        step = describe(*args, **kwargs)
        steps.pass_by(f"before {step}")
        result = plain(*args, **kwargs)
        steps.pass_by(f"after {step}")
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    _serve()
