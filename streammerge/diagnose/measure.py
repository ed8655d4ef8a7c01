"""Build the models, walk them, and put the numbers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streammerge._version import __version__
from streammerge.calibration.lockstep import Lockstep
from streammerge.calibration.measure import Preparation
from streammerge.calibration.texts import file_windows
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.diagnose.collapse import Collapse
from streammerge.diagnose.nonlinearity import NonlinearityWalk, wide
from streammerge.diagnose.numbers import mean, pearson
from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.errors import CheckpointError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.measure import compute_dtype, find_device, token_digest
from streammerge.fisher.placement import FisherRun, default_device
from streammerge.fisher.probes import random_tokens
from streammerge.heap import give_back, one_heap
from streammerge.host import memory_errors
from streammerge.progress import progress_bar
from streammerge.workers import Workers, single_threaded_torch

_COLLAPSE = (
    *("activation_variance", "variance_ratio", "effective_rank", "rank_ratio", "norm_shrinkage"),
    "mean_squared_angle",
)
_NONLINEARITY = ("nonlinearity", "relative_merging_error", "change")


def prepare(models: Sequence[Checkpoint], settings: DiagnoseSettings, run: FisherRun) -> Preparation:
    """Find out everything a diagnosis can be refused for before a weight is read. The first model has the tokenizer."""
    where = find_device(run.device or default_device())
    dtype = compute_dtype(models[0], settings.compute_dtype)
    if settings.nonlinearity and settings.compute_dtype is None:
        dtype = wide(dtype)  # outputs close to one another are subtracted
    built = [BlockModel(model, dtype, where, run.trust_remote_code) for model in models]
    for other in built[1:]:
        _require_same_blocks(built[0], other)
    return Preparation(built, where, [_tokens(models[0], built[0].vocab_size, settings)])


def measure(models: Sequence[Checkpoint], settings: DiagnoseSettings, run: FisherRun, progress: bool) -> dict[str, Any]:
    """See `diagnose`. `models`: the merged model and its sources, or the base and its fine-tune."""
    one_heap()
    prepared = prepare(models, settings, run)
    (ids,) = prepared.texts
    steps = len(prepared.models[0].blocks) * (3 if settings.nonlinearity else len(models))
    count = torch.get_num_threads() if prepared.where.type == "cpu" else 1
    with progress_bar(steps, "Diagnosis", "block", progress) as bar, single_threaded_torch(), Workers(count) as workers:

        def advance(done: int) -> None:
            bar.update(done)
            give_back()

        mend = "take fewer or shorter sequences (--samples, --length)"
        mend = mend if prepared.where.type == "cpu" else f"repeat the command with --device cpu, or {mend}"
        with memory_errors(f"the diagnosis on {prepared.where}", mend):
            found = (_nonlinearity if settings.nonlinearity else _collapse)(
                prepared.models, ids, settings, workers, advance
            )
    return {
        "version": __version__,
        "settings": settings.model_dump(),
        "tokens": token_digest(ids),
        "device": str(prepared.where),
        "compute_dtype": str(prepared.models[0].dtype).removeprefix("torch."),
        **found,
    }


def _collapse(
    models: list[BlockModel],
    ids: Tensor,
    settings: DiagnoseSettings,
    workers: Workers,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    collapse = Collapse(models, settings.rank, workers)
    Lockstep(models, ids, [collapse], workers, advance).run()
    return {
        "model": _identity(models[0].base),
        "against": [_identity(model.base) for model in models[1:]],
        "blocks": collapse.rows,
        "mean": _means(collapse.rows, _COLLAPSE),
        "proxy_objective": math.fsum(row["mean_squared_angle"] for row in collapse.rows),
        "notes": [],
    }


def _nonlinearity(
    models: list[BlockModel],
    ids: Tensor,
    settings: DiagnoseSettings,
    workers: Workers,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    base, tuned = models
    rows = NonlinearityWalk(base, tuned, ids, settings.alpha, workers, advance).run()
    used = [row for row in rows if row["change"] and None not in row.values()]
    correlation = pearson([row["nonlinearity"] for row in used], [row["relative_merging_error"] for row in used])
    return {
        "model": _identity(tuned.base),
        "against": [_identity(base.base)],
        "blocks": rows,
        "mean": _means(rows, _NONLINEARITY),
        "pearson": correlation,
        "correlated_blocks": [row["block"] for row in used],
        "notes": _notes(rows, used, correlation),
    }


def _notes(
    rows: Sequence[Mapping[str, Any]], used: Sequence[Mapping[str, Any]], correlation: float | None
) -> list[str]:
    same = sum(row["change"] == 0 for row in rows)
    odd = len(rows) - same - len(used)
    notes = []
    if same:
        notes.append(
            f"{same} of {len(rows)} blocks have the same output in both models; the correlation is without them"
        )
    if odd:
        notes.append(
            f"{odd} of {len(rows)} blocks have no score: in some sequence both models give the same output, the "
            "interpolated block another, or an output is zero; the correlation is without them"
        )
    if correlation is None:
        few = f"{len(used)} block(s) to correlate, which takes two"
        notes.append(f"the correlation is undefined: {few if len(used) < 2 else 'one of the two is constant'}")
    return notes


def _means(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float | None]:
    return {column: mean([row[column] for row in rows]) for column in columns}


def _identity(model: Checkpoint) -> dict[str, str | None]:
    return {"id": model.id, "revision": model.revision}


def _tokens(model: Checkpoint, vocab_size: int, settings: DiagnoseSettings) -> Tensor:
    if settings.text is None:
        return random_tokens(vocab_size, settings.samples, settings.length, settings.seed)
    return file_windows(
        model, vocab_size, settings.text, settings.text_field, settings.samples, settings.length, "--text"
    )


def _require_same_blocks(one: BlockModel, other: BlockModel) -> None:
    """The same parameters made of the same tensors, which models of one architecture may still differ in."""

    def blocks(model: BlockModel) -> list[list[tuple[object, ...]]]:
        return [
            [(slot.parameter, slot.shape, part.tensor.name, part.start) for slot in layout.slots for part in slot.parts]
            for layout in model.layouts
        ]

    if blocks(one) != blocks(other):
        raise CheckpointError(
            f"model {other.base.id}: its decoder blocks compute with other parameters than those of {one.base.id}"
        )
