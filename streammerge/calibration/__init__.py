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
from streammerge.compatibility import embedding_and_head
from streammerge.fisher.placement import IMPORT_BYTES, FisherRun, streamed_bytes, walk_reads


@dataclass(frozen=True)
class CalibrationCost:
    """What `plan` says of the walk over a calibration text.

    Attributes:
        measurements: what is measured.
        tokens: how many, per text.
        host_bytes: expected peak of the process.
        bytes_to_read: from the models' files, at most.
        bytes_to_stream: of these, over the network.
    """

    measurements: tuple[Measurement, ...]
    tokens: int
    host_bytes: int
    bytes_to_read: int
    bytes_to_stream: int


def calibration_cost(
    models: Sequence[Checkpoint], settings: CalibrationSettings, measurements: Sequence[Measurement]
) -> CalibrationCost:
    """From headers alone. `models`: the base and the fine-tuned ones."""
    prefix = decoder_prefix(models[0].tensors)
    blocks: dict[int, int] = {}
    for name, info in models[0].tensors.items():
        number = block_index(name, prefix)
        if number is not None:
            blocks[number] = blocks.get(number, 0) + info.nbytes
    tokens = settings.samples * settings.length
    host = IMPORT_BYTES + 2 * max(blocks.values(), default=0)
    walking = models[:1] if set(measurements) == {"channels"} else models
    reads = [(model, walk_reads(model, tokens, times=1, stay=(), heads=0)) for model in walking]
    if "mutual_information" in measurements and _has_own_head(models[0]):  # then every sample goes by all heads
        reads += [(model, _head_reads(model, settings.samples)) for model in walking]
    return CalibrationCost(
        measurements=tuple(measurements),
        tokens=tokens,
        host_bytes=host,
        bytes_to_read=sum(sum(of_model.values()) for _, of_model in reads),
        bytes_to_stream=sum(streamed_bytes(model, of_model) for model, of_model in reads),
    )


def _has_own_head(model: Checkpoint) -> bool:
    embedding, head = embedding_and_head(model)
    return embedding is not head


def _head_reads(model: Checkpoint, samples: int) -> dict[str, int]:
    _, head = embedding_and_head(model)
    return {} if head is None else {head.name: samples * head.nbytes}


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
