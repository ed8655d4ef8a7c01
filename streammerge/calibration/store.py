"""What was measured on a calibration text: numbers in `calibration.json`, tensors in safetensors files beside it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from streammerge.checkpoints import disk
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import torch_dtype
from streammerge.checkpoints.header import DTYPES, parse_header
from streammerge.checkpoints.layout import plan_shards
from streammerge.checkpoints.output import transfer_errors
from streammerge.checkpoints.shard_file import ShardFile
from streammerge.checkpoints.source import LocalFile
from streammerge.errors import RecipeError
from streammerge.fisher.store import ComputeDType
from streammerge.schema import FileName, Strict

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_FILE = "calibration.json"

# mutual_information   between the base's and each fine-tuned model's activations, per block and sample
# channels             mean magnitude of what goes into each module of the base, per input channel
# inputs               what goes into each linear layer, a row per token, in every model
# sensitivity          |weight * gradient| per block, and distances between the models' logits, in every model
Measurement = Literal["mutual_information", "channels", "inputs", "sensitivity"]
OF_EVERY_MODEL: frozenset[Measurement] = frozenset({"inputs", "sensitivity"})  # each on its own text, if it has one


class CalibrationSettings(Strict):
    """How a calibration text becomes tokens, and what runs on them."""

    text: list[str] = Field(
        default_factory=list,
        description="calibration text, plain or JSONL; where every model is measured, one for all or one each",
    )
    field: str = Field("text", description="field of a JSONL record that holds the text")
    samples: int = Field(16, ge=1, description="windows of the text, evenly spread over it")
    length: int = Field(128, ge=2, description="tokens per window")
    rows: int = Field(256, ge=1, description="tokens of the text whose inputs to linear layers regmean keeps")
    compute_dtype: ComputeDType | None = Field(None, description="dtype of forward and backward; the checkpoint's own")

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | os.PathLike) else value

    def text_of(self, model: int) -> int:
        """Which of the texts a model has; 0 is the base."""
        return model if len(self.text) > 1 else 0


class Sensitivity(Strict):
    """Of every model, the base first.

    Attributes:
        blocks: number of a decoder block -> mean over the samples of the sum of |weight * gradient| over its matrices.
        distances: [i][j]: mean over the tokens of j's text of |logits_i - logits_j|, in the Euclidean norm.
    """

    blocks: list[dict[int, float]]
    distances: list[list[float]]


class CalibrationRecord(Strict):
    """The content of `calibration.json`."""

    version: str
    settings: CalibrationSettings
    tokens: list[str] = Field(default_factory=list, description="SHA-256 of each text's token ids")
    device: str
    mutual_information: list[dict[str, list[float]]] | None = Field(
        None, description="per fine-tuned model: embedding, block number, norm or head -> nats in each sample"
    )
    sensitivity: Sensitivity | None = None
    tensors: dict[str, FileName] = Field(default_factory=dict, description="entry -> the file it is in")
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Calibrated:
    """What was measured, as a merge method sees it.

    Attributes:
        record: the numbers.
        read: reads an entry; see `entry`.
    """

    record: CalibrationRecord
    read: Callable[[str], Tensor]

    def of(self, tensor: str) -> Mapping[str, Sequence[Tensor]]:
        """What was measured of one tensor: measurement -> a tensor per model it was measured in, the base's first."""
        found: dict[str, list[Tensor]] = {}
        for measurement in ("channels", "inputs"):
            model = 0
            while (name := entry(measurement, model, tensor)) in self.record.tensors:
                found.setdefault(measurement, []).append(self.read(name))
                model += 1
        return found


def entry(measurement: str, model: int, tensor: str) -> str:
    """Under which name a measured tensor is stored."""
    return f"{measurement}.{model}.{tensor}"


def open_calibration(folder: Path) -> Calibrated:
    """A finished calibration of ours; its tensors are read when they are asked for."""
    path = folder / CALIBRATION_FILE
    with transfer_errors(path, "cannot be read"):
        record = CalibrationRecord.model_validate(json.loads(disk.read_file(path)))

    def read(name: str) -> Tensor:
        return _read_tensor(folder / record.tensors[name], name)

    return Calibrated(record, read)


def write_tensors(path: Path, entries: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; durable when this returns."""
    import torch

    names = {getattr(torch, dtype.torch_name): name for name, dtype in DTYPES.items() if dtype.torch_name}
    wanted = ((name, names[values.dtype], tuple(values.shape)) for name, values in entries.items())
    (shard,) = plan_shards(wanted, sys.maxsize)
    file = ShardFile(shard, path)
    try:
        for info in shard.tensors:
            file.write(info.start, as_bytes(entries[info.name].cpu().contiguous()))
        file.flush()
    finally:
        file.close()


def _read_tensor(path: Path, name: str) -> Tensor:
    import torch

    source = LocalFile(path, f"calibration, file {path}")
    try:
        info = parse_header(source.header(), source.size, path.name, source.where)[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        source.read_into(as_bytes(raw), info.start)
    finally:
        source.close()
    return raw.view(torch_dtype(info.dtype)).view(info.shape)


def text_digests(settings: CalibrationSettings) -> list[str]:
    """SHA-256 of each text.

    Raises:
        RecipeError: one cannot be read.
    """
    digests = []
    for path in settings.text:
        try:
            digests.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
        except (OSError, ValueError) as error:
            raise RecipeError(f"--calibration {path}: {getattr(error, 'strerror', None) or error}") from None
    return digests


def check_texts(settings: CalibrationSettings, measurements: Sequence[Measurement], models: int, method: str) -> None:
    """Refuse settings that do not fit what a method measures, from the recipe alone.

    Raises:
        RecipeError: no text, a text nobody reads, too many or too few, or one that cannot be read.
    """
    if not measurements:
        if settings != CalibrationSettings.model_validate({}):
            raise RecipeError(f"{method} with these parameters uses no calibration text: leave it out")
        return
    if not settings.text:
        raise RecipeError(
            f"{method} needs a calibration text: give --calibration FILE, plain text or JSONL with a field"
        )
    per_model = OF_EVERY_MODEL.intersection(measurements)
    allowed = {1, models} if per_model else {1}
    if len(settings.text) not in allowed or (len(settings.text) > 1 and len(per_model) < len(measurements)):
        raise RecipeError(
            f"{method}: {len(settings.text)} calibration texts for {models} models: give "
            + (f"one for all, or {models}: the base's first" if per_model else "one")
        )
    text_digests(settings)
