"""A Fisher is a checkpoint: safetensors under the base's tensor names, plus `fisher.json`.

`fisher.json` says which base and which settings it was made from, and holds the means and maxima per
decoder block and per tensor, taken from the float32 accumulators before they were rounded for storage.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.json_text import parse_object
from streammerge.checkpoints.output import WORK_DIR
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError, RecipeError, TransferError
from streammerge.schema import FileName, Strict, build

FISHER_FILE = "fisher.json"

StoredDType = Literal["bfloat16", "float32"]
ComputeDType = Literal["bfloat16", "float16", "float32", "float64"]
STORED_AS: dict[StoredDType, str] = {"bfloat16": "BF16", "float32": "F32"}


class FisherSettings(Strict):
    """How the Fisher is measured. `None` means: bfloat16 storage, or whatever a reused Fisher has."""

    samples: int = Field(8, ge=1, description="random token sequences")
    length: int = Field(64, ge=2, description="token ids per sequence")
    seed: int = Field(42, ge=0, description="seed of the token ids")
    compute_dtype: ComputeDType | None = Field(None, description="dtype of forward and backward; the checkpoint's own")
    dtype: StoredDType | None = Field(None, description="dtype in which the Fisher is stored; bfloat16")
    probe_text: str | None = Field(None, description="text file to take the tokens from; random tokens without it")
    all_parameters: bool = Field(False, description="every parameter, not only the decoder blocks' matrices")

    @property
    def probes(self) -> str:
        """What the Fisher is measured on, in words."""
        return "random tokens" if self.probe_text is None else f"the text {self.probe_text}"


class BaseIdentity(Strict):
    """The base model a Fisher belongs to."""

    id: str
    revision: str | None
    fingerprint: str


class TensorFisher(Strict):
    """Mean and maximum of one tensor's Fisher before it is rounded for storage; sums over rows run in float64."""

    block: int | None
    numel: int
    mean: float
    max: float


class BlockFisher(Strict):
    """The Fisher of one decoder block, pooled over its matrices by element count."""

    block: int
    mean: float
    max: float
    share: float = Field(description="part of the sum over all blocks")


class FisherRecord(Strict):
    """The content of `fisher.json`."""

    version: str
    base: BaseIdentity
    settings: FisherSettings
    probe: str = Field("", description="SHA-256 of the token ids")
    text: str | None = Field(None, description="SHA-256 of the text they are from")
    loss: float = Field(description="summed negative log-likelihood, mean over the sequences, in nats")
    device: str
    blocks: list[BlockFisher]
    tensors: dict[str, TensorFisher]
    unreached: list[str] = Field(
        default_factory=list, description="tensors of experts that no token reached, in whole or in part"
    )
    notes: list[str] = Field(default_factory=list, description="what a user should know")
    files: list[FileName] = Field(description="every file of the Fisher, so that --overwrite can replace it")

    @property
    def ratio(self) -> float | None:
        """Largest over smallest block mean; None where a block has none."""
        means = [block.mean for block in self.blocks]
        return max(means) / min(means) if means and min(means) > 0 else None


def is_finished(folder: Path) -> bool:
    """Whether there is a Fisher in the folder, and none being measured."""
    return (folder / FISHER_FILE).is_file() and not (folder / WORK_DIR).exists()


def pool_blocks(tensors: dict[str, TensorFisher], matrices: Iterable[str]) -> list[BlockFisher]:
    """Pool the tensors' means into blocks by element count, over the named matrices only."""
    groups: dict[int, list[TensorFisher]] = {}
    for name in matrices:
        block = tensors[name].block
        if block is not None:
            groups.setdefault(block, []).append(tensors[name])
    sums = {block: sum(t.mean * t.numel for t in group) for block, group in sorted(groups.items())}
    total = sum(sums.values())
    return [
        BlockFisher(
            block=block,
            mean=sums[block] / sum(t.numel for t in groups[block]),
            max=max(t.max for t in groups[block]),
            share=sums[block] / total if total > 0 else 0.0,
        )
        for block in sums
    ]


def open_fisher(
    folder: Path, base: Checkpoint, settings: FisherSettings, needed: Iterable[str]
) -> tuple[Checkpoint, FisherRecord]:
    """Open a Fisher for reuse, from its headers and `fisher.json` alone.

    Raises:
        CheckpointError: the folder holds no Fisher.
        IncompatibleCheckpointsError: it was made with other settings, or its tensors are not the base's.
    """
    path = folder / FISHER_FILE
    if not path.is_file():
        raise CheckpointError(f"Fisher {folder}: there is no {FISHER_FILE}; make one with: streammerge fisher")
    where = f"Fisher {folder}, file {FISHER_FILE}"
    try:
        record = build(FisherRecord, parse_object(path.read_bytes(), where), where)
    except RecipeError as error:
        raise CheckpointError(str(error)[:400]) from None
    except OSError as error:
        raise TransferError(f"{where}: cannot be read: {error.strerror}") from error
    checkpoint = Checkpoint.open(folder, id=f"Fisher {folder}", need_config=False)
    mismatches = _differences(record, settings)
    for name in needed:
        shape = base.info(name).shape
        if name not in checkpoint.tensors or name not in record.tensors:
            mismatches.append(f"tensor {name!r} is missing")
        elif checkpoint.tensors[name].shape != shape:
            mismatches.append(f"tensor {name!r} is {list(checkpoint.tensors[name].shape)}, in the base {list(shape)}")
        elif not checkpoint.tensors[name].floating:
            mismatches.append(f"tensor {name!r} is {checkpoint.tensors[name].dtype}, not floating")
    if mismatches:
        checkpoint.close()
        raise IncompatibleCheckpointsError(
            f"Fisher {folder} does not fit this merge; give the settings it was made with, or make another with "
            "`streammerge fisher`:",
            mismatches,
        )
    return checkpoint, record


def check_same_base(record: FisherRecord, base: Checkpoint, fingerprint: str) -> None:
    """Refuse a Fisher made from another base model.

    Raises:
        IncompatibleCheckpointsError: the content of the base differs from what the Fisher was made from.
    """
    if record.base.fingerprint != fingerprint:
        made = record.base.id + (f"@{record.base.revision}" if record.base.revision else "")
        raise IncompatibleCheckpointsError(
            f"the Fisher was made from another base model; make one from {base.id} with `streammerge fisher`:",
            [f"it was made from {made}, whose content differs from {base.id}"],
        )


def text_digest(settings: FisherSettings) -> str | None:
    """SHA-256 of the text the tokens come from; None for random tokens.

    Raises:
        RecipeError: the file cannot be read.
    """
    if settings.probe_text is None:
        return None
    try:
        return hashlib.sha256(Path(settings.probe_text).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise RecipeError(f"--probe-text {settings.probe_text}: {getattr(error, 'strerror', None) or error}") from None


def _differences(record: FisherRecord, wanted: FisherSettings) -> list[str]:
    made = record.settings
    found = []
    if made.probes != wanted.probes and None in (made.probe_text, wanted.probe_text):
        found.append(f"it was measured on {made.probes}, asked for {wanted.probes}")
    elif record.text != text_digest(wanted):
        found.append(f"it was measured on {made.probes}, whose content is not that of {wanted.probe_text}")
    for key in ("samples", "length", "seed", "compute_dtype"):
        if getattr(made, key) != getattr(wanted, key):
            found.append(f"{key} is {getattr(made, key)}, asked for {getattr(wanted, key)}")
    if wanted.dtype is not None and made.dtype != wanted.dtype:
        found.append(f"dtype is {made.dtype}, asked for {wanted.dtype}")
    return found
