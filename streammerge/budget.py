"""How much memory a merge and a Fisher pass take, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix
from streammerge.checkpoints.header import DTYPES, TensorInfo
from streammerge.errors import MemoryBudgetError
from streammerge.fisher.store import FisherSettings
from streammerge.methods.api import TensorContext, Unit
from streammerge.units import format_size

DEFAULT_MAX_RAM = 256 * 2**20
IMPORT_BYTES = 240 * 2**20  # a process that has imported torch, before any data
FISHER_IMPORT_BYTES = 420 * 2**20  # the same with transformers and accelerate

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
    max_ram: int, threads: int | None, units: Sequence[Unit], inputs: Mapping[str, Sequence[TensorInfo]]
) -> Budget:
    """Cut `max_ram` into workers. Fewer workers are taken where it is too small for all.

    Raises:
        MemoryBudgetError: not even one tile of every tensor fits, with the smallest budget that does.
    """
    tensors = [tensor for unit in units for tensor in unit.tensors]
    tile = max(run_bytes(t, inputs[t.name], t.tile_rows) for t in tensors)
    # Temporaries per tile and element: base, Fisher, sums, float64 copies; five per expert.
    scratch = max(t.tile_rows * t.columns * 4 * (10 + 5 * (len(inputs[t.name]) - 1)) for t in tensors)
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
    return Budget(workers, min(max_ram // workers - scratch, max(largest, tile)), scratch)


def fisher_bytes(base: Checkpoint, settings: FisherSettings) -> int:
    """Peak bytes a Fisher pass holds on its device: what lies outside the blocks, one block, its squares.

    Counted: weights and two gradients in the compute dtype, squares in float32, three float32 copies of one
    sequence's logits.
    """
    prefix = decoder_prefix(base.tensors)
    width = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(settings.compute_dtype or "", 0)
    blocks: dict[int, int] = {}
    squares: dict[int, int] = {}
    outside = outside_elements = largest = vocabulary = 0
    for name, info in base.tensors.items():
        number = block_index(name, prefix)
        nbytes = info.numel * (width or DTYPES[info.dtype].bits // 8)
        if number is None:
            outside += nbytes
            outside_elements += info.numel
            vocabulary = max(vocabulary, info.shape[0] if len(info.shape) == 2 else 0)
        else:
            blocks[number] = blocks.get(number, 0) + nbytes
            largest = max(largest, nbytes)
            if len(info.shape) > 1 or settings.all_parameters:
                squares[number] = squares.get(number, 0) + 4 * info.numel
    if settings.all_parameters:
        outside += 4 * outside_elements + outside  # squares and one gradient
    head = 3 * 4 * settings.length * vocabulary
    block = max((blocks[b] + squares.get(b, 0) for b in blocks), default=0) + 2 * largest
    return outside + head + block
