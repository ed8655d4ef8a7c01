"""The diagonal Fisher information of a base model: the only place that builds a transformers model."""

from __future__ import annotations

from pathlib import Path

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.locate import open_model
from streammerge.fisher.store import FisherRecord, FisherSettings

DEFAULT_SHARD_BYTES = 5_000_000_000


def fisher(
    base: str | Checkpoint,
    out: str | Path,
    settings: FisherSettings | None = None,
    *,
    device: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> FisherRecord:
    """Measure the diagonal Fisher of a base model on random tokens, one decoder block in memory at a time.

        F = (1/N) sum_i (d log p(x_i | theta) / d theta)^2,    x_i ~ Uniform(vocabulary)^length

    The result is a checkpoint under the base's tensor names, plus `fisher.json`; every merge of that base
    can reuse it.

    Args:
        base: folder, org/name[@revision], hf://org/name[@revision], or an open checkpoint.
        out: the output folder.
        settings: samples, length, seed, dtypes.
        device: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        max_shard_bytes: largest shard of the result.
        overwrite: replace an earlier Fisher in `out`.
        progress: show a progress bar on standard error.

    Raises:
        CheckpointError: the model cannot be walked block by block, or gives non-finite gradients.
        OutputExistsError: `out` is not free.

    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
    """
    from streammerge.fisher.measure import default_device, measure  # imports torch and transformers

    if not isinstance(base, Checkpoint):
        with open_model(base) as checkpoint:
            return fisher(
                checkpoint,
                out,
                settings,
                device=device,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
    return measure(
        base,
        Path(out),
        settings or FisherSettings.model_validate({}),
        device=device or default_device(),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
