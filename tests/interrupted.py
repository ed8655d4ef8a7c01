"""The command line in processes of their own that are killed at chosen places.

`python tests/interrupted.py` reads jobs, one JSON object a line, and runs each in a fork of itself: torch and
transformers are imported once instead of once per process. The fork writes down every step it comes by, and sends
itself a signal at the one that the job names, or so many seconds after it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Lock, Timer
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        status: its exit status; negative: the signal that killed it.
        steps: what it came by, in order.
        err: its standard error.
        times: when it came by each step, in seconds of its life.
    """

    status: int
    steps: list[str]
    err: str
    times: list[float]


class Processes:
    """Starts processes. Use as a context manager.

    Args:
        base: a model to warm up with.
        folder: an empty one, for that and for what they print.
        environment: variables to set.
    """

    def __init__(self, base: Path, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        command = [sys.executable, __file__, str(base), str(folder / "warm")]
        variables = {**os.environ, **(environment or {})}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, **pipes, text=True, env=variables)

    def run(
        self,
        *arguments: object,
        at: str | None = None,
        delay: float | None = None,
        stuck: bool = False,
        grace: float | None = None,
        signal: int = signal.SIGKILL,
        sync_seconds: float = 2.0,
        threads: int = 1,
        report: bool = False,
        forks: bool = False,
    ) -> Ended:
        """Run the command line.

        Args:
            at: the step at which the signal is sent: "before ..." or "after ...", as `Ended.steps` names them.
            delay: seconds after that at which it is sent instead, whatever the process does then; after the start of
                the process where there is no `at`.
            stuck: be in a single long call of C at that step when the signal arrives.
            grace: seconds that the first signal leaves a process that is stuck; then comes a second one, at once.
            sync_seconds: how often what is complete is recorded besides.
            threads: workers of a Fisher pass.
            report: let a merge leave its report, which no two runs share.
            forks: have several workers of a merge be forks, however small it is.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        log, err = self.folder / "log", self.folder / "err"
        job = {"arguments": [str(a) for a in arguments], "at": at, "delay": delay, "signal": signal}
        job |= {"stuck": stuck, "grace": grace}
        job |= {"log": str(log), "err": str(err), "sync": sync_seconds, "threads": threads}
        job |= {"report": report, "forks": forks}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        return Ended(status, [step for _, step in lines], err.read_text(), [float(at) for at, _ in lines])

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def _serve() -> None:
    importlib.import_module("streammerge.engine")  # before the forks
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

        from streammerge import signals
        from streammerge.__main__ import main
        from streammerge.checkpoints import writer

        torch.set_num_threads(job["threads"])
        signals.GRACE_SECONDS = job["grace"] or signals.GRACE_SECONDS
        writer.SYNC_SECONDS = job["sync"]
        if job["forks"]:
            importlib.import_module("streammerge.plan").WORTH_FORKING = 0
        if not job["report"]:
            importlib.import_module("streammerge.merge").draw_report = lambda *args: {}
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
        self._at, self._delay, self._signal = job["at"], job["delay"], job["signal"]
        self._stuck, self._twice = job["stuck"], job["grace"] is not None
        self._began = time.monotonic()
        self._log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._seen: Counter[str] = Counter()
        self._lock = Lock()
        if self._at is None and self._delay is not None:
            self._send()

    def pass_by(self, step: str) -> None:
        with self._lock:
            self._seen[step] += 1
            if self._seen[step] > 1:
                step = f"{step} #{self._seen[step]}"
            os.write(self._log, f"{time.monotonic() - self._began:.6f} {step}\n".encode())
        if self._at == step:
            self._send()
            if self._stuck:
                try:
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # half a minute and more
                finally:
                    self.pass_by("got away")

    def _send(self) -> None:
        for delay in [0.2, 0.4][: 1 + self._twice] if self._stuck else [self._delay]:
            if delay is None:
                os.kill(os.getpid(), self._signal)
            else:
                timer = Timer(delay, os.kill, (os.getpid(), self._signal))
                timer.daemon = True
                timer.start()


def _watch(steps: _Steps) -> None:
    from streammerge.checkpoints import disk
    from streammerge.checkpoints.work import WorkFolder
    from streammerge.checkpoints.writer import CheckpointWriter
    from streammerge.engine import Engine
    from streammerge.fisher.feed import BlockFeed
    from streammerge.fisher.measure import _FisherSink
    from streammerge.fisher.state import WalkState
    from streammerge.fisher.walk import Walk
    from streammerge.hub.commit import Commit
    from streammerge.hub.ledger import Ledger
    from streammerge.hub.target import HubTarget

    watched: list[tuple[Any, str, Callable[..., str]]] = [
        (importlib.import_module("streammerge.merge"), "_measure", lambda *_: "measure"),
        (Engine, "_work", lambda self, label, *rest: label.lower()),
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
        (CheckpointWriter, "complete", lambda self, name, entry, written: f"complete {name}"),
        (CheckpointWriter, "publish", lambda self, *files: "publish"),
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
