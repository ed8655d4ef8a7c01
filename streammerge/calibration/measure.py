"""Measure what merge methods ask for, on calibration texts, and write it into a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streammerge._version import __version__
from streammerge.calibration.channels import ChannelMagnitudes
from streammerge.calibration.inputs import LinearInputs
from streammerge.calibration.lockstep import Lockstep, Observer
from streammerge.calibration.mutual_information import MutualInformation
from streammerge.calibration.sensitivity import measure_sensitivity, sensitivity_steps
from streammerge.calibration.store import (
    CALIBRATION_FILE,
    CalibrationRecord,
    CalibrationSettings,
    Measurement,
    Sensitivity,
    entry,
    write_tensors,
)
from streammerge.calibration.texts import calibration_tokens
from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.output import transfer_errors
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.measure import compute_dtype, find_device, token_digest
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import FisherRun, default_device
from streammerge.heap import give_back, large_buffers_apart, one_heap
from streammerge.host import memory_errors
from streammerge.progress import progress_bar
from streammerge.workers import Workers, single_threaded_torch


@dataclass(frozen=True)
class Preparation:
    """All that is known of a calibration before a weight is read or a file is written.

    Attributes:
        models: the base and the fine-tuned ones, nothing loaded.
        where: the device.
        texts: token ids [samples, length] of every text.
    """

    models: list[BlockModel]
    where: torch.device
    texts: list[Tensor]


def prepare(models: Sequence[Checkpoint], settings: CalibrationSettings, run: FisherRun) -> Preparation:
    """Find out everything a calibration can be refused for before it begins; see `calibration.check`."""
    where = find_device(run.device or default_device())
    built = [
        BlockModel(model, compute_dtype(model, settings.compute_dtype), where, run.trust_remote_code)
        for model in models
    ]
    return Preparation(built, where, calibration_tokens(models[0], built[0].vocab_size, settings))


def measure(
    models: Sequence[Checkpoint],
    settings: CalibrationSettings,
    measurements: Sequence[Measurement],
    folder: Path,
    run: FisherRun,
    *,
    progress: bool = False,
    phases: Phases | None = None,
) -> CalibrationRecord:
    """Measure, and write `calibration.json` last; see `calibration.calibrate`.

    Raises:
        RecipeError, CheckpointError: see `calibration.check`; a non-finite weight or activation.
        MemoryBudgetError: the device is too small.
        TransferError: the folder cannot be written.
    """
    phases = phases or Phases()
    one_heap()
    large_buffers_apart()
    prepared = prepare(models, settings, run)
    tensors: dict[str, str] = {}

    def save_entries(name: str, entries: Mapping[str, Tensor]) -> None:
        file = f"{name}.safetensors"
        write_tensors(folder / file, entries)
        tensors.update(dict.fromkeys(entries, file))  # `calibration.json` comes last: no file counts before it

    walks = _walks(prepared, settings, measurements)
    steps = sum(len(numbers) * len(prepared.models[0].blocks) for numbers, _ in walks)
    if "sensitivity" in measurements:
        steps += sensitivity_steps(prepared.models, len(prepared.texts))
    count = torch.get_num_threads() if prepared.where.type == "cpu" else 1
    found: list[dict[str, list[float]]] | None = None
    sensitivity: Sensitivity | None = None
    with (
        transfer_errors(folder, "cannot be written"),
        progress_bar(steps, "Calibration", "block", progress) as bar,
        single_threaded_torch(),
        Workers(count) as workers,
    ):
        disk.make_folder(folder)

        def advance(done: int) -> None:
            bar.update(done)
            give_back()

        for numbers, ids in walks:
            walking = [prepared.models[number] for number in numbers]
            observers: dict[Measurement, Observer] = {
                "mutual_information": MutualInformation(walking, workers, phases),
                "channels": ChannelMagnitudes(walking[0]),
                "inputs": LinearInputs(walking, numbers, ids.numel(), settings.rows, save_entries),
            }
            seeing = [observer for name, observer in observers.items() if name in measurements]
            with _memory_errors(prepared.where):
                Lockstep(walking, ids, seeing, workers, advance, phases).run()
            for observer in seeing:
                if isinstance(observer, MutualInformation):
                    found = observer.found
                elif isinstance(observer, ChannelMagnitudes):
                    save_entries("channels", {entry("channels", 0, name): v for name, v in observer.found.items()})
        if "sensitivity" in measurements:
            with _memory_errors(prepared.where):
                sensitivity = measure_sensitivity(
                    prepared.models, prepared.texts, settings, folder / "walk", workers, advance, phases
                )
        record = CalibrationRecord(
            version=__version__,
            settings=settings,
            tokens=[token_digest(ids) for ids in prepared.texts],
            device=str(prepared.where),
            mutual_information=found,
            sensitivity=sensitivity,
            tensors=tensors,
        )
        disk.replace_file(folder / CALIBRATION_FILE, json.dumps(record.model_dump(), indent=1).encode() + b"\n")
    return record


def _walks(
    prepared: Preparation, settings: CalibrationSettings, measurements: Sequence[Measurement]
) -> list[tuple[list[int], Tensor]]:
    """Which models walk in step over which text: of channels alone, only the base; of sensitivities, see there."""
    observed = set(measurements) - {"sensitivity"}
    if not observed:
        return []
    models = [0] if observed == {"channels"} else range(len(prepared.models))
    walks = []
    for text, ids in enumerate(prepared.texts):
        numbers = [number for number in models if settings.text_of(number) == text]
        if numbers:
            walks.append((numbers, ids))
    return walks


def _memory_errors(where: torch.device) -> AbstractContextManager[None]:
    mend = "take fewer or shorter texts (--calibration-samples, --calibration-length)"
    mend = mend if where.type == "cpu" else f"repeat the command with --device cpu, or {mend}"
    return memory_errors(f"the calibration on {where}", mend)
