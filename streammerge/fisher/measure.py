"""Measure the diagonal Fisher of a base model and write it as a checkpoint."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streammerge._version import __version__
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix, torch_dtype
from streammerge.checkpoints.layout import file_names, plan_shards
from streammerge.checkpoints.output import check_output
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.compatibility import refuse_quantised
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.probes import random_tokens
from streammerge.fisher.store import (
    FISHER_FILE,
    STORED_AS,
    BaseIdentity,
    FisherRecord,
    FisherSettings,
    TensorFisher,
    pool_blocks,
)
from streammerge.fisher.walk import walk
from streammerge.progress import progress_bar

_M_MMAP_THRESHOLD = -3  # of malloc.h


def block_matrices(base: Checkpoint) -> list[str]:
    """The floating tensors of two or more dimensions inside the decoder blocks: what a Fisher holds by default."""
    prefix = decoder_prefix(base.tensors)
    return [
        name
        for name, info in base.tensors.items()
        if block_index(name, prefix) is not None and len(info.shape) > 1 and info.floating
    ]


def measure(
    base: Checkpoint,
    out: Path,
    settings: FisherSettings,
    *,
    device: str,
    max_shard_bytes: int,
    overwrite: bool = False,
    progress: bool = True,
) -> FisherRecord:
    """Measure the Fisher of `base` on random tokens and write it into the folder `out`.

    Raises:
        OutputExistsError: `out` is not free.
        RecipeError: there is no such device.
        CheckpointError: the model cannot be walked, or gives non-finite gradients.
    """
    refuse_quantised(base)
    check_output(out, [base.folder], overwrite, manifest=FISHER_FILE)
    _return_freed_memory()
    dtype = _compute_dtype(base, settings)
    model = BlockModel(base, dtype, _device(device))
    wanted = _wanted(base, model, settings)
    stored = settings.dtype or "bfloat16"
    shards = plan_shards(((n, STORED_AS[stored], base.info(n).shape) for n in wanted), max_shard_bytes)
    ids = random_tokens(model.vocab_size, settings.samples, settings.length, settings.seed)
    identity = BaseIdentity(id=base.id, revision=base.revision, fingerprint=base.fingerprint())
    with (
        CheckpointWriter(out, shards, {"fisher of": base.id}, fresh=True, manifest=FISHER_FILE) as writer,
        progress_bar(2 * len(model.blocks), "Fisher", "block", progress) as bar,
    ):
        sink = _Sink(writer, getattr(torch, stored), decoder_prefix(base.tensors))
        try:
            loss = walk(model, ids, set(wanted), sink, bar.update)
        except BaseException:
            writer.discard()
            raise
        record = FisherRecord(
            version=__version__,
            base=identity,
            settings=settings.model_copy(update={"dtype": stored}),
            loss=loss,
            device=device,
            blocks=pool_blocks(sink.tensors, block_matrices(base)),
            tensors={name: sink.tensors[name] for name in wanted},
            files=[*file_names(shards), FISHER_FILE],
        )
        content = json.dumps(record.model_dump(), indent=2).encode() + b"\n"
        writer.publish({FISHER_FILE: content})
    return record


@dataclass
class _Sink:
    """Writes what the walk hands over, and notes each tensor's mean and maximum before it is rounded."""

    writer: CheckpointWriter
    dtype: torch.dtype
    prefix: str | None

    def __post_init__(self) -> None:
        self.tensors: dict[str, TensorFisher] = {}

    def __call__(self, fishers: Mapping[str, Tensor]) -> None:
        for name, fisher in fishers.items():
            mean = fisher.sum(dtype=torch.float64).item() / max(fisher.numel(), 1)
            most = fisher.max().item() if fisher.numel() else 0.0
            summary = TensorFisher(block=block_index(name, self.prefix), numel=fisher.numel(), mean=mean, max=most)
            self.tensors[name] = summary
            self.writer.write(name, 0, as_bytes(fisher.to("cpu", self.dtype)))
            self.writer.complete(name, {})


def _compute_dtype(base: Checkpoint, settings: FisherSettings) -> torch.dtype:
    """What was asked for, else the dtype of most of the base's elements."""
    if settings.compute_dtype is not None:
        return getattr(torch, settings.compute_dtype)  # type: ignore[no-any-return]
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.floating:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    if not sizes:
        raise CheckpointError(f"model {base.id}: it has no floating tensor")
    return torch_dtype(max(sizes, key=lambda dtype: sizes[dtype]))


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: there is no such device here ({str(error).splitlines()[0]})") from None


def _wanted(base: Checkpoint, model: BlockModel, settings: FisherSettings) -> list[str]:
    matrices = block_matrices(base)
    _require_known(matrices, model, base)
    if settings.all_parameters:
        return [name for name in base.tensors if name in model.tensor_names]
    return matrices


def _require_known(names: Iterable[str], model: BlockModel, base: Checkpoint) -> None:
    unknown = sorted(set(names) - model.tensor_names)
    if unknown:
        raise CheckpointError(
            f"model {base.id}: tensor {unknown[0]!r} and {len(unknown) - 1} more are no parameters of "
            f"{type(model.model).__name__} in transformers under that name, so their Fisher cannot be measured"
        )


def _return_freed_memory() -> None:
    """Have glibc give large freed buffers back to the system at once.

    Left alone it raises the size from which it does so up to 32 MiB, and then keeps most of a block's gradients
    and temporaries: measured on the 1.5B shape, a quarter of the peak.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def default_device() -> str:
    """The first GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
