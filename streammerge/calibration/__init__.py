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
from streammerge.fisher.placement import (
    GROUP_TOKENS,
    HEAD_TOKENS,
    IMPORT_BYTES,
    FisherRun,
    attention_bytes,
    fisher_memory,
    streamed_bytes,
    walk_reads,
)
from streammerge.fisher.store import FisherSettings
from streammerge.heap import large_imports

_SLACK = 40 << 20
_MODEL_BYTES = 32 << 20  # a model without its blocks, and its share of the tokenizer and the text


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
    reads = _reads(models, settings, measurements)
    return CalibrationCost(
        measurements=tuple(measurements),
        tokens=settings.samples * settings.length,
        host_bytes=_host_bytes(models, settings, measurements),
        bytes_to_read=sum(sum(of_model.values()) for _, of_model in reads),
        bytes_to_stream=sum(streamed_bytes(model, of_model) for model, of_model in reads),
    )


def _reads(
    models: Sequence[Checkpoint], settings: CalibrationSettings, measurements: Sequence[Measurement]
) -> list[tuple[Checkpoint, dict[str, int]]]:
    """Bytes of each tensor that every walk reads."""
    tokens, observed = settings.samples * settings.length, set(measurements) - {"sensitivity"}
    walking = models[:1] if observed == {"channels"} else models
    reads = []
    if observed:
        reads += [(model, walk_reads(model, tokens, times=1, stay=(), heads=0)) for model in walking]
    if "mutual_information" in observed and _has_own_head(models[0]):  # then every sample goes by all heads
        reads += [(model, _head_reads(model, settings.samples)) for model in walking]
    if "sensitivity" in measurements:  # there and back, as in a Fisher pass, and then in step over every text
        groups = -(-settings.samples * (settings.length - 1) // HEAD_TOKENS)
        reads += [(model, walk_reads(model, tokens, times=2, stay=(), heads=groups)) for model in models]
        for _ in settings.text or [""]:
            reads += [(model, walk_reads(model, tokens, times=1, stay=(), heads=1)) for model in models]
    return reads


def _host_bytes(
    models: Sequence[Checkpoint], settings: CalibrationSettings, measurements: Sequence[Measurement]
) -> int:
    """Expected peak of the process."""
    base = models[0]
    walking = models[:1] if set(measurements) == {"channels"} else models
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
    states = (2 * len(walking) + 1) * settings.samples * settings.length * hidden * width
    # Fitted on the 0.5B and 1.5B shapes: what a group of tokens goes through, and what the allocator keeps.
    block = max(blocks.values(), default=0) + 12 * max(GROUP_TOKENS, settings.length) * widest + _SLACK
    if settings.length > GROUP_TOKENS:  # below, it is in the fit
        block += attention_bytes(base.config, settings.samples, settings.length)
    if "inputs" in measurements:
        block += 2 * len(walking) * settings.rows * max(columns.values(), default=0) * width
    head = 0
    if "mutual_information" in measurements and _has_own_head(base):
        head = settings.length * vocabulary * (2 * len(walking) + 8)
    host = IMPORT_BYTES + states + max(block, head)
    if "sensitivity" in measurements:  # its gradients are taken group by group
        passes = FisherSettings.model_validate(
            {
                "samples": max(1, GROUP_TOKENS // settings.length),
                "length": settings.length,
                "compute_dtype": settings.compute_dtype,
            }
        )
        one = max((fisher_memory(model, passes) for model in models), key=lambda memory: memory.on_cpu)
        host = max(host, IMPORT_BYTES + len(models) * _MODEL_BYTES + states + one.on_cpu)
    return host


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
    with large_imports():
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
        with large_imports():
            from streammerge.calibration.measure import measure  # imports torch and transformers

        measure(models, settings, measurements, folder, run, progress=progress)
    return open_calibration(folder)
