"""Exact selection of the k largest of 200 million scores that are never in memory, checked in full.

    python benchmarks/selection.py
    python benchmarks/selection.py --elements 1000000000 --kinds bfloat16

For each kind of scores and each of two block sizes the passes of `streammerge.methods.selection` run over a matrix of
that many elements, made row block by row block from counter-based draws. Then every element is looked at again and
compared with what plain float comparisons say: with t the threshold that was found, fewer than k scores are larger
and at least k are larger or equal, so t is the k-th largest; kept must be all that are larger and the first of those
that are equal, k in all. Both block sizes must give the same selection and the same mask, k = 0 and k = n must keep
nothing and everything, and a smaller matrix is compared with a stable sort. Any difference stops the script.

Kinds: differences of two models in bfloat16 (masses of equal scores), uniform float32, denormals, all equal.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streammerge.budget import DEFAULT_MAX_RAM, IMPORT_BYTES
from streammerge.methods.api import TILE_ELEMENTS, RowBlock, TensorContext, Unit
from streammerge.methods.draws import stream_key, uniform
from streammerge.methods.selection import Selection, kept_count, top_k_passes
from streammerge.row_reader import SAMPLED_OF

COLUMNS = 8192
BLOCK_ROWS = (TILE_ELEMENTS // COLUMNS, 157)  # as in a merge; and one that divides nothing
SORTED = 2_000_000  # elements that are sorted for comparison
DENSITY = 0.2
PEAK = IMPORT_BYTES + DEFAULT_MAX_RAM  # what `streammerge plan` would promise


# --- the scores ---------------------------------------------------------------------------------------------------


def bfloat16(first: int, shape: tuple[int, int]) -> Tensor:
    base, task = (uniform(stream_key(0, "weight", model), first, shape).sub_(0.5) for model in (0, 1))
    base.mul_(0.1)
    tuned = task.mul_(0.001).add_(base)
    return tuned.bfloat16().float().sub_(base.bfloat16().float()).abs_()


def float32(first: int, shape: tuple[int, int]) -> Tensor:
    return uniform(stream_key(0, "weight", 0), first, shape)


def denormal(first: int, shape: tuple[int, int]) -> Tensor:
    return uniform(stream_key(0, "weight", 0), first, shape).mul_(2.0**23).to(torch.int32).view(torch.float32)


def equal(first: int, shape: tuple[int, int]) -> Tensor:
    return torch.full(shape, 0.25)


KINDS: dict[str, Callable[[int, tuple[int, int]], Tensor]] = {
    kind.__name__: kind for kind in (bfloat16, float32, denormal, equal)
}


class Stream:
    """The row blocks of a matrix of scores, made anew at every pass.

    Attributes:
        passes: how often all of it was gone through.
        seconds: spent on making scores.
    """

    def __init__(self, kind: str, elements: int, rows: int) -> None:
        self.make, self.rows = KINDS[kind], rows
        self.tensor = TensorContext("weight", (-(-elements // COLUMNS), COLUMNS), "F32", 0)
        self.passes, self.seconds = 0, 0.0

    def blocks(self) -> Iterator[RowBlock]:
        self.passes += 1
        return self._from_rows(range(0, self.tensor.rows, self.rows))

    def sample(self) -> Iterator[RowBlock]:
        return self._from_rows(range(0, self.tensor.rows, SAMPLED_OF * self.rows))

    def _from_rows(self, rows: range) -> Iterator[RowBlock]:
        for row in rows:
            start = time.perf_counter()
            scores = self.make(row * COLUMNS, (min(self.rows, self.tensor.rows - row), COLUMNS))
            self.seconds += time.perf_counter() - start
            yield RowBlock(self.tensor, 0, row, [scores], [], torch.float32)


# --- selection, and what must be true of it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The selections of the k largest, of none and of all; seconds without those spent on making scores."""

    selections: list[Selection]
    passes: int
    seconds: float


def select(stream: Stream) -> Found:
    start = time.perf_counter()
    unit, results = Unit("weight", (stream.tensor,)), dict[str, Any]()
    for step in top_k_passes(lambda block: [block.stored[0]] * 3, [DENSITY, 0.0, 1.0]):
        state = step.start(unit, results)
        if state is not None:
            for block in stream.sample() if step.samples else stream.blocks() if step.reads_rows else ():
                step.update(state, block)
            results[step.name] = step.finish(state)
    return Found(results["selection"], stream.passes, time.perf_counter() - start - stream.seconds)


def count(stream: Stream, threshold: float) -> tuple[int, int]:
    """How many scores are larger than the threshold, and how many equal to it."""
    larger = same = 0
    for block in stream.blocks():
        larger += int((block.stored[0] > threshold).sum())
        same += int((block.stored[0] == threshold).sum())
    return larger, same


def check(stream: Stream, found: Found) -> tuple[str, int, int]:
    """Compare every element's mask with plain comparisons; SHA-256 of the mask, ties kept, ties in all."""
    selection, none, everything = found.selections
    k = kept_count(DENSITY, stream.tensor.numel)
    threshold = torch.tensor(selection.threshold, dtype=torch.int32).view(torch.float32).item()
    larger, same = count(stream, threshold)
    require(larger < k <= larger + same, f"{threshold} is not the {k}-th largest: {larger} are larger, {same} equal")
    digest, kept, seen = hashlib.sha256(), 0, 0
    for block in stream.blocks():
        scores = block.stored[0]
        mask = selection.mask(scores, block.offset).bool()
        ties = scores == threshold
        places = ties.flatten().cumsum(0).view(ties.shape) + seen
        expected = (scores > threshold) | (ties & (places <= k - larger))
        require(torch.equal(mask, expected), f"another mask from row {block.row} on")
        require(not none.mask(scores, block.offset).any(), "k = 0 keeps something")
        require(bool(everything.mask(scores, block.offset).all()), "k = n drops something")
        digest.update(mask.numpy().tobytes())
        kept += int(mask.sum())
        seen += int(ties.sum())
    require(kept == k == selection.kept, f"{kept} are kept, not {k}")
    return digest.hexdigest(), k - larger, same


def check_sorted(kind: str, elements: int) -> None:
    """Compare with a stable sort of all scores."""
    stream = Stream(kind, elements, BLOCK_ROWS[1])
    selection = select(stream).selections[0]
    scores = torch.cat([block.stored[0] for block in stream.blocks()]).flatten()
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[scores.argsort(descending=True, stable=True)[: kept_count(DENSITY, len(scores))]] = True
    require(torch.equal(selection.mask(scores, 0).bool(), expected), f"{kind}: not what a stable sort gives")


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SystemExit(f"error: {otherwise}")


def peak() -> float:
    """The process's own peak in bytes, as the kernel has it; `ru_maxrss` would begin with that of the parent."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=200_000_000, help="at least this many (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # as a worker of a merge
    before = peak()
    print(f"{platform.platform()}, torch {version('torch')}, one thread\n")
    print("| scores | block | kept | ties kept, of | passes | time | GB/s |\n|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        outcomes = set()
        for rows in BLOCK_ROWS:
            stream = Stream(kind, arguments.elements, rows)
            found = select(stream)
            speed = 4e-9 * found.passes * stream.tensor.numel / found.seconds
            digest, kept, ties = check(stream, found)
            outcomes.add((found.selections[0], digest))
            print(
                f"| {kind} | {rows * COLUMNS:,} | {found.selections[0].kept:,} | {kept:,} of {ties:,} | {found.passes} "
                f"| {found.seconds:.1f} s | {speed:.2f} |",
                flush=True,
            )
        require(len(outcomes) == 1, f"{kind}: the selection depends on the block size")
    used = peak()
    print(f"\npeak memory {used / 2**20:.0f} MiB, {before / 2**20:.0f} MiB of it before the first score was made")
    require(used <= PEAK, f"a merge may take {PEAK / 2**20:.0f} MiB")
    for kind in arguments.kinds:
        check_sorted(kind, min(arguments.elements, SORTED))
    print("every element as plain comparisons say, the same for both block sizes; a smaller matrix as a stable sort")


if __name__ == "__main__":
    main()
