"""Peak memory of the whole process for each method on synthetic checkpoints of a real shape.

    python benchmarks/memory.py --shape qwen2-1.5b --out benchmarks/out

Makes the checkpoints where they are not there yet (base tied, fine-tunes untied, as in the paper's 1.5B pair), merges
them once per method through the command line, with its default parameters and the fewest fine-tunes it takes, verifies
each output, and prints one Markdown table. What a method needs before the merge (a survey, a Fisher pass, a
measurement on a calibration text) is part of what is measured. Memory is that of the process and its forks together,
what they share counted once (Pss), looked at every 0.05 s, or where it is more what the process alone took
(`ru_maxrss`); times are of one run each and only say what is long.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from make_checkpoints import SHAPES, make_pair
from measuring import measure

from streammerge import METHODS
from streammerge.catalogue import cost_of
from streammerge.errors import OutputExistsError

WORDS, LINE = 200_000, 100  # words of the calibration text, and words in a line of it
SENTENCE = "the cat sat on a mat and then some numbers were added until nothing was left to prove here"
OURS = [sys.executable, "-m", "streammerge"]


def make_models(shape: str, folder: Path) -> None:
    """A base, as many fine-tunes as any method needs at least, and a calibration text beside them."""
    experts = max(method.fewest_experts for method in METHODS.values())
    if not all((model / "tokenizer.json").is_file() for model in [folder / "base", *fine_tunes(folder, experts)]):
        try:
            make_pair(shape, folder, experts=experts, ft_tie=False)
        except OutputExistsError:
            raise SystemExit(f"{folder} is not what this script makes: remove it, or choose another --out") from None
    (folder / "calibration.txt").write_text(calibration_text(WORDS), "utf-8")


def fine_tunes(folder: Path, count: int) -> list[Path]:
    return [folder / f"ft{k if k > 1 else ''}" for k in range(1, count + 1)]


def calibration_text(words: int) -> str:
    """Plain words in an order that is the same every time: about a million bytes in 200,000 of them."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(SENTENCE.split(), k=min(LINE, words - i))) for i in range(0, words, LINE)]
    return "".join(f"{line}.\n" for line in lines)


def options(method: str, folder: Path) -> list[str]:
    """How the method is called on the checkpoints in `folder`."""
    models = [word for model in fine_tunes(folder, METHODS[method].fewest_experts) for word in ("--ft", str(model))]
    text = ["--calibration", str(folder / "calibration.txt")] if cost_of(method).calibration else []
    return ["--base", str(folder / "base"), *models, "--method", method, *text]


def row(method: str, folder: Path, out: Path) -> str:
    """Merge, verify and measure: the method's line of the table."""
    called = options(method, folder)
    plan = subprocess.run([*OURS, "plan", *called, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    planned = json.loads(plan.stdout)["peak_host_bytes"] / 2**20
    used = measure([*OURS, "merge", *called, "--out", str(out), "--quiet"], looks=0.05)
    measure([*OURS, "verify", str(out), "--quiet"])
    before = ", ".join(cost_of(method).before) or "-"
    fewest = METHODS[method].fewest_experts
    return f"| `{method}` | {fewest} | {before} | {used.peak:.0f} MiB | {planned:.0f} MiB | {used.cpu:.0f} s | yes |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for checkpoints and merges")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoints")
    arguments = parser.parse_args(argv)
    folder = arguments.out / arguments.shape
    make_models(arguments.shape, folder)
    print(f"{arguments.shape}, {os.cpu_count()} cores, {platform.platform()}, torch {version('torch')}\n")
    print("| method | fine-tunes | before the merge | peak memory | planned | processor time | verified |")
    print("|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        out = arguments.out / f"{arguments.shape}-{method}"
        shutil.rmtree(out, ignore_errors=True)
        print(row(method, folder, out), flush=True)
        if not arguments.keep:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
