"""The diagonal Fisher information of a base model: the only place that builds a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix
from streammerge.checkpoints.disk_space import Need, allocated, require_room
from streammerge.checkpoints.locate import open_model, require_pinned
from streammerge.checkpoints.output import WORK_DIR
from streammerge.fisher.placement import (
    CUDA_BYTES,
    IMPORT_BYTES,
    FisherRun,
    default_device,
    expected_tokens,
    fisher_disk,
    fisher_memory,
    streamed_bytes,
    walk_reads,
)
from streammerge.fisher.store import FisherRecord, FisherSettings
from streammerge.heap import large_imports
from streammerge.host import require_memory
from streammerge.hub.pull import HubMode
from streammerge.names import Named
from streammerge.schema import build

DEFAULT_SHARD_BYTES = 5_000_000_000


def fisher(
    base: Named | Checkpoint,
    out: str | Path,
    settings: FisherSettings | Mapping[str, Any] | None = None,
    *,
    hub_mode: HubMode = "cache",
    device: str | None = None,
    max_vram: int | None = None,
    device_map: str = "auto",
    trust_remote_code: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    check_disk: bool = True,
    progress: bool = False,
) -> FisherRecord:
    """Measure the diagonal Fisher of a base model on random tokens, one decoder block in memory at a time.

        F = (1/N) sum_i (d log p(x_i | theta) / d theta)^2,    x_i ~ Uniform(vocabulary)^length

    The result is a checkpoint under the base's tensor names, plus `fisher.json`; every merge of that base
    can reuse it. Interrupted, the same call goes on at the block where it was, and ends with the same bytes.

    Args:
        base: folder, org/name[@revision], hf://org/name[@revision], or an open checkpoint.
        out: the output folder.
        settings: samples, length, seed, text, dtypes; a mapping is read as one.
        hub_mode: how a model on the Hub is read: "cache" or "stream"; see `merge`.
        device: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        max_vram: bytes to use on the GPU; 90% of what is free by default. With room, blocks stay there.
        device_map: "auto", or a JSON file {module name: device} that says which blocks stay on the device.
        trust_remote_code: run Python code that the model brings; a Hub model must then be pinned to a commit.
        max_shard_bytes: largest shard of the result.
        overwrite: replace an earlier Fisher in `out`, or start an unfinished one anew.
        check_disk: refuse to begin where the disk says that it has no room for it.
        progress: show a progress bar on standard error.

    Raises:
        RecipeError: no such device, a device map that is none, code of a model that is not pinned.
        CheckpointError: the model cannot be walked block by block, or gives non-finite gradients.
        MemoryBudgetError: the GPU, or this machine, is too small. What is done stays, for the next call.
        TransferError: the disk is too small.
        OutputExistsError: `out` is not free.

    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
    """
    with large_imports():
        from streammerge.fisher.measure import measure  # imports torch and transformers

    if not isinstance(settings, FisherSettings):
        settings = build(FisherSettings, settings or {}, "Fisher settings")
    run = FisherRun(device, max_vram, device_map, trust_remote_code)
    with ExitStack() as stack:
        if not isinstance(base, Checkpoint):
            if trust_remote_code:
                require_pinned(base)
            base = stack.enter_context(open_model(base, hub_mode, progress))
        if (device or default_device()) == "cpu":
            peak = IMPORT_BYTES + fisher_memory(base, settings).on_cpu
            require_memory(peak, "this Fisher pass", "take fewer or shorter sequences (--samples, --length)")
        if check_disk:
            disk = fisher_disk(base, settings)
            size = disk.result + disk.scratch
            there = min(allocated(Path(out) / WORK_DIR), size)
            require_room([Need("Fisher", Path(out), size, there)], "choose another --out")
        return measure(
            base, Path(out), settings, run, max_shard_bytes=max_shard_bytes, overwrite=overwrite, progress=progress
        )


@dataclass(frozen=True)
class FisherPlacement:
    """What `plan` says of a Fisher pass.

    Attributes:
        device: its name.
        stay: how many blocks stay on the device, of how many.
        blocks: how many blocks there are.
        device_bytes: expected peak on a GPU; 0 on the CPU.
        host_bytes: expected peak of the process.
        bytes_to_read: from the base's files.
        bytes_to_stream: of these, over the network.
    """

    device: str
    stay: int
    blocks: int
    device_bytes: int
    host_bytes: int
    bytes_to_read: int
    bytes_to_stream: int


def check(base: Checkpoint, settings: FisherSettings, run: FisherRun) -> None:
    """Refuse a pass before it begins, for everything that can be known by then.

    Raises:
        RecipeError: no such device, a device map or a text that is none, an option that does not fit the device.
        CheckpointError: the model cannot be walked, or brings no tokenizer for the text.
        MemoryBudgetError: the GPU is too small, with the smallest that works.
    """
    with large_imports():
        from streammerge.fisher.measure import prepare  # imports torch and transformers

    prepare(base, settings, run)


def place(base: Checkpoint, settings: FisherSettings, run: FisherRun) -> FisherPlacement:
    """What `plan` says of a pass that is yet to come.

    Raises:
        MemoryBudgetError: the GPU's budget is too small, with the smallest that works.
        RecipeError, CheckpointError: see `check`; on the CPU and random tokens, not all of it.
    """
    memory = fisher_memory(base, settings)
    prefix = decoder_prefix(base.tensors)
    numbers = {number for name in base.tensors if (number := block_index(name, prefix)) is not None}
    tokens = expected_tokens(base, settings.samples * settings.length)
    name = run.device or default_device()
    on_cpu, stay = name == "cpu", frozenset[int]()
    if not on_cpu or run != FisherRun(run.device, trust_remote_code=run.trust_remote_code) or settings.probe_text:
        with large_imports():
            from streammerge.fisher.measure import prepare  # imports torch and transformers

        prepared = prepare(base, settings, run)
        on_cpu, stay = prepared.where.type == "cpu", prepared.stay
        tokens = len(prepared.ids.unique())
    resident = sum(info.nbytes for n, info in base.tensors.items() if block_index(n, prefix) in stay)
    on_device = (memory.on_cpu if on_cpu else memory.on_gpu) + resident
    host = IMPORT_BYTES + (on_device if on_cpu else CUDA_BYTES + 2 * memory.block)
    reads = walk_reads(base, tokens, times=2, stay=stay, heads=2 if settings.all_parameters else 1)
    return FisherPlacement(
        device=name,
        stay=len(stay),
        blocks=len(numbers),
        device_bytes=0 if on_cpu else on_device,
        host_bytes=host,
        bytes_to_read=sum(reads.values()),
        bytes_to_stream=streamed_bytes(base, reads),
    )
