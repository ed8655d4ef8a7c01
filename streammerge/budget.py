"""How much memory a merge takes, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import MemoryBudgetError
from streammerge.methods.api import TensorContext, Unit
from streammerge.units import format_size

DEFAULT_MAX_RAM = 256 * 2**20
IMPORT_BYTES = 240 * 2**20  # a process that has imported torch, before any data
FORK_BYTES = 12 * 2**20  # what a fork of it copies because it writes there, and what its heap keeps between tiles
MOST_KEPT = 24 * 2**20  # of local files in a buffer: a larger unit is in the system's cache when it is read again
WORTH_FORKING = 64 * 2**20  # bytes to be read: below that forks take longer than they save

_ALIGNMENT = 64
_MAX_WORKERS = 8


def aligned(count: int) -> int:
    """`count` rounded up to where the next view into a buffer may start."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def run_bytes(tensor: TensorContext, inputs: Iterable[TensorInfo], rows: int) -> int:
    """Buffer bytes that `rows` rows of a tensor take in all its inputs together."""
    return sum(aligned(rows * (info.nbytes // max(tensor.rows, 1))) for info in inputs)


def unit_bytes(unit: Unit, inputs: Mapping[str, Sequence[TensorInfo]]) -> int:
    """Buffer bytes of a whole unit."""
    return sum(run_bytes(tensor, inputs[tensor.name], tensor.rows) for tensor in unit.tensors)


@dataclass(frozen=True)
class Budget:
    """How the memory of a merge is cut up.

    Attributes:
        workers: units worked on at once, one thread each.
        buffer_bytes: read buffer of each worker.
        scratch_bytes: temporaries of each worker, an upper estimate.
    """

    workers: int
    buffer_bytes: int
    scratch_bytes: int

    @property
    def total(self) -> int:
        return self.workers * (self.buffer_bytes + self.scratch_bytes)


def make_budget(
    max_ram: int,
    threads: int | None,
    units: Sequence[Unit],
    inputs: Mapping[str, Sequence[TensorInfo]],
    held: Mapping[str, int] | None = None,
    most: int | None = None,
) -> Budget:
    """Cut `max_ram` into workers. Fewer workers are taken where it is too small for all.

    Args:
        max_ram: bytes for buffers and temporaries.
        threads: workers wanted.
        units: the work.
        inputs: what is read for each tensor.
        held: bytes a method holds for a tensor besides its row blocks' temporaries.
        most: bytes that a buffer is of use for, if the tile of every tensor fits; any number by default.

    Raises:
        MemoryBudgetError: not even one tile of every tensor fits, with the smallest budget that does.
    """
    tensors = [tensor for unit in units for tensor in unit.tensors]
    tile = max(run_bytes(t, inputs[t.name], t.tile_rows) for t in tensors)
    # Temporaries per tile and element: base, Fisher, sums, float64 copies; five per expert.
    held = held or {}
    scratch = max(
        t.tile_rows * t.columns * 4 * (10 + 5 * (len(inputs[t.name]) - 1)) + held.get(t.name, 0) for t in tensors
    )
    least = tile + scratch
    if least > max_ram:
        widest = max(tensors, key=lambda t: run_bytes(t, inputs[t.name], t.tile_rows))
        raise MemoryBudgetError(
            f"--max-ram of {format_size(max_ram)} cannot hold one piece of tensor {widest.name!r} in every input: "
            f"give at least {-(-least // 2**20)}MiB"
        )
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = threads or min(processors, _MAX_WORKERS)
    workers = max(1, min(wanted, max_ram // least, len(units)))
    largest = max(unit_bytes(unit, inputs) for unit in units)
    useful = largest if most is None else min(largest, most)
    return Budget(workers, min(max_ram // workers - scratch, max(useful, tile)), scratch)
