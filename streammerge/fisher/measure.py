"""Measure the diagonal Fisher of a base model and write it as a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from streammerge._version import __version__
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix, torch_dtype
from streammerge.checkpoints.layout import Shard, file_names, plan_shards
from streammerge.checkpoints.output import check_output, void_with_inputs
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.compatibility import refuse_quantised
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.device_map import blocks_that_stay
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import FisherRun, default_device
from streammerge.fisher.probes import probe_tokens
from streammerge.fisher.reduction import FisherSquares
from streammerge.fisher.state import WalkState
from streammerge.fisher.store import (
    FISHER_FILE,
    STORED_AS,
    BaseIdentity,
    ComputeDType,
    FisherRecord,
    FisherSettings,
    TensorFisher,
    pool_blocks,
    text_digest,
)
from streammerge.fisher.walk import Walk
from streammerge.heap import give_back, one_heap
from streammerge.host import memory_errors
from streammerge.progress import progress_bar
from streammerge.workers import Workers, single_threaded_torch


def block_matrices(base: Checkpoint) -> list[str]:
    """The floating tensors of two or more dimensions inside the decoder blocks: what a Fisher holds by default."""
    prefix = decoder_prefix(base.tensors)
    return [
        name
        for name, info in base.tensors.items()
        if block_index(name, prefix) is not None and len(info.shape) > 1 and info.floating
    ]


@dataclass(frozen=True)
class Preparation:
    """All that is known of a pass before a weight is read or a file is written.

    Attributes:
        model: the model, nothing loaded.
        where: the device.
        wanted: names of the tensors to measure.
        stay: blocks that stay on the device between forward and backward.
        ids: token ids [samples, length].
    """

    model: BlockModel
    where: torch.device
    wanted: list[str]
    stay: frozenset[int]
    ids: Tensor


def prepare(base: Checkpoint, settings: FisherSettings, run: FisherRun) -> Preparation:
    """Find out everything a pass can be refused for before it begins.

    Raises:
        RecipeError: no such device, a device map or a text that is none, an option that does not fit the device.
        CheckpointError: the model cannot be walked, or brings no tokenizer for the text.
        MemoryBudgetError: the device is too small.
    """
    refuse_quantised(base)
    where = find_device(run.device or default_device())
    model = BlockModel(base, compute_dtype(base, settings.compute_dtype), where, run.trust_remote_code)
    wanted = _wanted(base, model, settings)
    stay = blocks_that_stay(model, settings, where, run)
    return Preparation(model, where, wanted, stay, probe_tokens(base, model.vocab_size, settings))


def measure(
    base: Checkpoint,
    out: Path,
    settings: FisherSettings,
    run: FisherRun,
    *,
    max_shard_bytes: int,
    overwrite: bool = False,
    progress: bool = True,
    phases: Phases | None = None,
) -> FisherRecord:
    """Measure the Fisher of `base` and write it into the folder `out`; go on where an interrupted call was.

    Raises:
        OutputExistsError: `out` is not free.
        RecipeError: there is no such device, or the device map is no map of this model.
        CheckpointError: the model cannot be walked, or gives non-finite gradients.
        MemoryBudgetError: the device is too small. What is done stays, for the next call.
    """
    phases = phases or Phases()
    check_output(out, [base.folder], overwrite, manifest=FISHER_FILE)
    one_heap()
    prepared = prepare(base, settings, run)
    model, where, wanted, ids = prepared.model, prepared.where, prepared.wanted, prepared.ids
    stored = settings.dtype or "bfloat16"
    shards = plan_shards(((n, STORED_AS[stored], base.info(n).shape) for n in reversed(wanted)), max_shard_bytes)
    count = torch.get_num_threads() if where.type == "cpu" else 1
    identity = BaseIdentity(id=base.id, revision=base.revision, fingerprint=base.fingerprint())
    with (
        _writer(out, shards, identity, base.stamps(), settings, ids, str(where), overwrite) as writer,
        progress_bar(2 * len(model.blocks) + 1, "Fisher", "block", progress) as bar,
        single_threaded_torch(),
        Workers(count) as workers,
    ):

        def advance(steps: int) -> None:
            bar.update(steps)
            give_back()

        sink = _FisherSink(writer, getattr(torch, stored), phases)
        state = WalkState(writer.work / "walk")
        reduction = FisherSquares(model, set(wanted), sink, len(ids), workers)
        walk = Walk(model, ids, reduction, state, workers, prepared.stay, advance, phases)
        with (
            memory_errors(f"the Fisher pass on {where}", _MEND[where.type != "cpu"]),
            void_with_inputs([base], writer.discard),
        ):
            walk.run()
            base.require_unchanged()
        writer.wait()
        record = _record(base, model, settings, identity, ids, walk, writer, str(where))
        content = json.dumps(record.model_dump(), indent=2).encode() + b"\n"
        writer.publish({FISHER_FILE: content})
    return record


_MEND = {
    True: "repeat the command with a smaller --max-vram, and it goes on at the block where it was; or start anew with "
    "--device cpu --overwrite",
    False: "take fewer or shorter sequences (--fisher-samples, --fisher-length)",
}


def _writer(
    out: Path,
    shards: Sequence[Shard],
    base: BaseIdentity,
    stamps: Mapping[str, tuple[int, int]],
    settings: FisherSettings,
    ids: Tensor,
    device: str,
    overwrite: bool,
) -> CheckpointWriter:
    """The writer of a Fisher, whose unfinished run only the same pass may finish."""
    identity = {
        "version": __version__,
        "base": {**base.model_dump(), "files": stamps},
        **settings.model_dump(),
        "tokens": token_digest(ids),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }
    return CheckpointWriter(out, shards, identity, fresh=overwrite, manifest=FISHER_FILE)


def _record(
    base: Checkpoint,
    model: BlockModel,
    settings: FisherSettings,
    identity: BaseIdentity,
    ids: Tensor,
    walk: Walk,
    writer: CheckpointWriter,
    device: str,
) -> FisherRecord:
    prefix = decoder_prefix(base.tensors)
    entries = writer.entries
    tensors = {
        name: TensorFisher(
            block=block_index(name, prefix), numel=info.numel, mean=entries[name]["mean"], max=entries[name]["max"]
        )
        for name, info in base.tensors.items()
        if name in entries
    }
    unreached = [name for name in tensors if not entries[name]["reached"]]
    notes = list(walk.notes)
    if unreached:
        notes.append(
            f"{len(unreached)} tensors of experts were reached by no token, in whole or in part, {unreached[0]!r} the "
            "first: they have the mean Fisher of their block's other experts; more samples reach more"
        )
    stored = settings.dtype or "bfloat16"
    return FisherRecord(
        version=__version__,
        base=identity,
        settings=settings.model_copy(update={"dtype": stored}),
        probe=token_digest(ids),
        text=text_digest(settings),
        loss=walk.losses.mean().item(),
        device=device,
        blocks=pool_blocks(tensors, block_matrices(base)),
        tensors=tensors,
        unreached=unreached,
        notes=notes,
        files=[*file_names(writer.shards), FISHER_FILE],
    )


def token_digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


class _FisherSink:
    """Writes what the walk hands over, and notes each tensor's mean and maximum before it is rounded."""

    def __init__(self, writer: CheckpointWriter, dtype: torch.dtype, phases: Phases) -> None:
        self._writer, self._dtype, self._phases = writer, dtype, phases
        self._sums: dict[str, list[float]] = {}
        self._most: dict[str, float] = {}
        self._written: dict[str, list[int]] = {}
        self._lock = Lock()

    def has(self, name: str) -> bool:
        return self._writer.is_complete(name)

    def mean(self, name: str) -> float | None:
        entry = self._writer.entries[name]
        return float(entry["mean"]) if entry["reached"] else None

    def write(self, name: str, start: int, values: Tensor) -> float:
        with self._phases.time("write"):
            total = values.sum(-1).sum(dtype=torch.float64).item()
            most = values.max().item() if values.numel() else 0.0
            stored = values.to(self._dtype).to("cpu").contiguous()
            written = self._writer.write(name, start * self._dtype.itemsize, as_bytes(stored))
        with self._lock:
            self._written.setdefault(name, []).append(written)
            self._sums.setdefault(name, []).append(total)
            self._most[name] = max(self._most.get(name, 0.0), most)
        return total

    def done(self, name: str, reached: bool = True) -> None:
        numel = self._writer.info(name).numel
        mean = math.fsum(self._sums.pop(name, ())) / max(numel, 1)
        entry = {"mean": mean, "max": self._most.pop(name, 0.0), "reached": reached}
        self._writer.complete(name, entry, self._written.pop(name, ()))

    def sync(self) -> None:
        with self._phases.time("state"):
            self._writer.sync()


def compute_dtype(base: Checkpoint, wanted: ComputeDType | None) -> torch.dtype:
    """What was asked for, else the dtype of most of the base's elements."""
    if wanted is not None:
        asked_for: torch.dtype = getattr(torch, wanted)
        return asked_for
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.floating:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    if not sizes:
        raise CheckpointError(f"model {base.id}: it has no floating tensor")
    return torch_dtype(max(sizes, key=lambda dtype: sizes[dtype]))


def find_device(name: str) -> torch.device:
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: there is no such device here ({str(error).splitlines()[0]})") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: models run on cpu or cuda")
    return device


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
