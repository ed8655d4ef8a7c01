"""What models do with a calibration text: walked block by block as in a Fisher pass, several models in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.calibration.store import (
    CALIBRATION_FILE,
    Calibrated,
    CalibrationSettings,
    Measurement,
    open_calibration,
)
from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix
from streammerge.fisher.placement import GROUP_TOKENS, IMPORT_BYTES, FisherRun, fisher_memory
from streammerge.fisher.store import FisherSettings

_SLACK = 40 << 20
_MODEL_BYTES = 32 << 20  # a model without its blocks, and its share of the tokenizer and the text


@dataclass(frozen=True)
class CalibrationCost:
    """What `plan` says of the walk over a calibration text.

    Attributes:
        measurements: what is measured.
        tokens: how many, per text.
        host_bytes: expected peak of the process.
        bytes_to_read: from the models' files.
    """

    measurements: tuple[Measurement, ...]
    tokens: int
    host_bytes: int
    bytes_to_read: int


def calibration_cost(
    models: Sequence[Checkpoint], settings: CalibrationSettings, measurements: Sequence[Measurement]
) -> CalibrationCost:
    """From headers alone. `models`: the base and the fine-tuned ones."""
    base = models[0]
    walking = models[:1] if set(measurements) == {"channels"} else models
    sizes = [sum(info.nbytes for info in model.tensors.values()) for model in walking]
    prefix = decoder_prefix(base.tensors)
    blocks: dict[int, int] = {}
    columns: dict[int, int] = {}
    vocabulary = hidden = widest = width = 0
    for name, info in base.tensors.items():
        number = block_index(name, prefix)
        if number is None:
            if len(info.shape) == 2 and info.shape[0] > vocabulary:
                vocabulary, hidden = info.shape
                width = info.nbytes // max(info.numel, 1)
        elif len(info.shape) > 1:
            blocks[number] = blocks.get(number, 0) + info.nbytes
            columns[number] = columns.get(number, 0) + info.shape[-1]
            widest = max(widest, info.shape[-2])
    tokens = settings.samples * settings.length
    states = (2 * len(walking) + 1) * tokens * hidden * width
    # Fitted on the 0.5B and 1.5B shapes: what a group of tokens goes through, and what the allocator keeps.
    block = max(blocks.values(), default=0) + 12 * GROUP_TOKENS * widest + _SLACK
    if "inputs" in measurements:
        block += 2 * len(walking) * settings.rows * max(columns.values(), default=0) * width
    head = 0
    if "mutual_information" in measurements and _has_head(base):
        head = settings.length * vocabulary * (2 * len(walking) + 8)
    host, to_read = IMPORT_BYTES + states + max(block, head), 0
    if set(measurements) - {"sensitivity"}:
        to_read += sum(sizes)
    if "sensitivity" in measurements:  # there and back, as in a Fisher pass, and then in step over every text
        to_read += (1 + max(len(settings.text), 1)) * sum(sizes) + len(models) * sum(blocks.values())
        passes = FisherSettings.model_validate(
            {"samples": settings.samples, "length": settings.length, "compute_dtype": settings.compute_dtype}
        )
        memory = [fisher_memory(model, passes) for model in models]
        begun = IMPORT_BYTES + len(models) * _MODEL_BYTES
        host = max(host, *(begun + one.block + one.work for one in memory))
    return CalibrationCost(tuple(measurements), tokens, host, to_read)


def _has_head(model: Checkpoint) -> bool:
    return any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in model.tensors)


def check(models: Sequence[Checkpoint], settings: CalibrationSettings, run: FisherRun) -> None:
    """Refuse a calibration before it begins, for everything that can be known by then.

    Raises:
        RecipeError: no such device; a text that is too short, or has no such field.
        CheckpointError: a model cannot be walked, or the base brings no tokenizer.
    """
    from streammerge.calibration.measure import prepare  # imports torch and transformers

    prepare(models, settings, run)


def calibrate(
    models: Sequence[Checkpoint],
    settings: CalibrationSettings,
    measurements: Sequence[Measurement],
    folder: Path,
    run: FisherRun,
    *,
    progress: bool = False,
) -> Calibrated:
    """Measure what is asked for, or open what an earlier call has measured in `folder`.

    Args:
        models: the base and the fine-tuned models.
        settings: the text, and how it is cut.
        measurements: what is measured.
        folder: where the result goes; what an interrupted call left there is measured again.
        run: the device.
        progress: show a progress bar on standard error.
    """
    if not (folder / CALIBRATION_FILE).is_file():
        from streammerge.calibration.measure import measure  # imports torch and transformers

        measure(models, settings, measurements, folder, run, progress=progress)
    return open_calibration(folder)
