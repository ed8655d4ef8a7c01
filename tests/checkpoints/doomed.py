"""A process that writes the checkpoint of `resuming` and is killed meanwhile, or holds its folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.resuming import fill, start

import streammerge


def child(out: Path, calls: int) -> subprocess.Popen[str]:
    """This file as a process that kills itself at its call number `calls` of a function that changes a file."""
    command = [sys.executable, __file__, str(out), str(calls)]
    path = os.pathsep.join([str(Path(streammerge.__file__).parents[1]), *filter(None, sys.path)])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)


def run_and_die(out: Path, calls: int) -> None:
    counter = iter(range(calls))

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(counter, None) is None:
                if real in (write, pwrite):
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    write, pwrite = os.write, os.pwrite
    for name in ("write", "pwrite", "fdatasync", "fsync", "replace", "posix_fallocate"):
        setattr(os, name, deadly(getattr(os, name)))
    with start(out) as target:
        for name in ("b", "e", "a", "f", "d", "empty"):
            fill(target, [name])
            target.sync()
            print(name, flush=True)
        target.publish({"config.json": b"{}"})
    print(calls - len(list(counter)))


def hold(out: Path) -> None:
    with start(out) as target:
        fill(target, ["a"])
        target.sync()
        print("holding", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    out_folder, number_of_calls = Path(sys.argv[1]), int(sys.argv[2])
    run_and_die(out_folder, number_of_calls) if number_of_calls >= 0 else hold(out_folder)
