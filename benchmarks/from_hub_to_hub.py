"""Peak memory, bytes on the network and shards on disk of a merge that reads from the Hub and pushes to it.

    python benchmarks/from_hub_to_hub.py --shape qwen2-0.5b --out benchmarks/out

Makes a pair of checkpoints of a real shape where they are not there yet, puts them on a Hub on the loopback interface,
and merges them from there by byte ranges, in several ways to keep the result: in a folder, or pushed without one, by
LFS and, where `--max-ram` has room for it, by Xet. Prints one Markdown table. Memory is the kernel's own account of the
finished process (`ru_maxrss`); the Hub runs in this one. Every pushed model is compared with the one in the folder,
byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from make_checkpoints import SHAPES, make_pair
from measuring import measure
from memory import OURS

from streammerge.testing import Hub

WAYS = {
    "in a folder": "256MiB",
    "pushed": "256MiB",
    "pushed by Xet": "512MiB",
}  # --max-ram; with 376 MiB or more Xet is used
READING = ("info", "resolve", "download")


def measured(command: list[str], environment: Mapping[str, str], home: Path) -> tuple[float, int]:
    """Run a command; peak resident MiB, and the most shards of the merge that lay in the cache at once."""
    most, done = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.02):
            for place, _, names in os.walk(home):
                if place.endswith("/.streammerge") and "/fisher-" not in place:
                    most = max(most, sum(name.endswith(".safetensors") for name in names))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        peak = measure(command, environment).peak
    finally:
        done.set()
        watcher.join()
    return peak, most


def row(hub: Hub, method: str, way: str, shard: str, out: Path) -> str:
    """Merge in one way: its line of the table."""
    pushed = way != "in a folder"
    home, repository = out / "home", f"org/{method}-{way.replace(' ', '-')}"
    shutil.rmtree(home, ignore_errors=True)
    environment = {**hub.environment(), "HF_HOME": str(home), "HF_TOKEN": "hf_any"}
    command = ["--base", "org/base", "--ft", "org/ft", "--hub-mode", "stream", "-m", method, "--max-shard-size", shard]
    command += ["--max-ram", WAYS[way]]
    command += ["--device", "cpu"] if method.startswith("fim") else []
    target = ["--out", str(out / method)] if not pushed else ["--push-to-hub", repository]
    plan = [*OURS, "plan", *command, *(target if pushed else []), "--json"]
    planned = json.loads(
        subprocess.run(plan, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE).stdout
    )
    hub.record.clear()
    peak, most = measured([*OURS, "merge", *command, *target, "-q"], environment, home)
    if pushed:
        for name in hub.files(repository):
            local = out / method / name
            if name.endswith(".safetensors") and hub.read(repository, name) != local.read_bytes():
                raise SystemExit(f"{repository}: {name} is not what the merge in a folder made")
    read = sum(e.served for e in hub.record if e.endpoint in READING and f"/{repository}" not in e.path)
    announced = planned["from_hub"]["total"]
    sent = sum(e.received for e in hub.record if e.endpoint in ("upload", "xorb-upload"))
    return (
        f"| `{method}` | {way} | {WAYS[way]} | {peak:.0f} MiB | {planned['peak_host_bytes'] / 2**20:.0f} MiB | "
        f"{read / 1e6:.1f} MB | {announced / 1e6:.1f} MB | {sent / 1e6:.1f} MB | {most or '-'} |"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for checkpoints and merges")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "fim_ties"], metavar="METHOD")
    parser.add_argument("--max-shard-size", default="200MB")
    arguments = parser.parse_args(argv)
    folder, work = arguments.out / f"{arguments.shape}-pair", arguments.out / f"{arguments.shape}-hub"
    if not (folder / "ft").exists():
        make_pair(arguments.shape, folder, say=lambda line: None)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    client = f"huggingface_hub {version('huggingface_hub')}, hf_xet {version('hf_xet')}"
    print(f"{arguments.shape}, {os.cpu_count()} cores, {platform.platform()}, {client}\n")
    columns = ("method", "result", "--max-ram", "peak memory", "planned", "read from the Hub", "planned", "uploaded")
    print(f"| {' | '.join(columns)} | most shards on disk |")
    print("|---|---|---|---|---|---|---|---|---|")
    with Hub(folder=work / "hub") as hub:
        for name in ("base", "ft"):
            hub.add(f"org/{name}", folder / name)
        for method in arguments.methods:
            for way in WAYS:
                print(row(hub, method, way, arguments.max_shard_size, work), flush=True)
            shutil.rmtree(work / method)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
