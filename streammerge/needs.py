"""Everything that a merge writes, and how much of it there already is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streammerge.checkpoints.disk_space import Need, allocated, blocks_of
from streammerge.checkpoints.layout import Shard
from streammerge.checkpoints.output import WORK_DIR
from streammerge.fisher.placement import fisher_disk
from streammerge.plan import MergePlan

_PER_TENSOR = 2048  # bytes of journal, manifest and index, together; a tensor's line has about 300, thrice
_FEW = 1 << 20  # model card, plot, other lines


def merge_needs(
    plan: MergePlan,
    out: Path,
    *,
    downloads: Path | None = None,
    save_fisher: Path | None = None,
    keep: bool = True,
    overwrite: bool = False,
) -> list[Need]:
    """Everything that a merge writes.

    Args:
        plan: the merge.
        out: its output folder, or where it works without one.
        downloads: the Hub's cache.
        save_fisher: where a measured Fisher is kept.
        keep: keep all shards; else at most two are there at a time.
        overwrite: an unfinished run is removed first.
    """
    work = out / WORK_DIR
    sizes = [shard.size for shard in plan.shards]
    weights = sum(sizes) if keep else sum(sorted(sizes)[-2:])
    there = 0 if overwrite else _written(plan.shards, out)
    needs = [Need("output", out, weights, min(there, weights))]
    needs.append(Need("journal and other files", out, _FEW + _PER_TENSOR * len(plan.contexts) + _side_files(plan)))
    if not plan.fishers:
        for number, model in enumerate(plan.of_fishers):
            folder = work / f"fisher-{number}" if save_fisher is None else save_fisher
            fisher = fisher_disk(model, plan.recipe.fisher)
            size = fisher.result + fisher.scratch
            needs.append(Need("Fisher", folder, size, 0 if overwrite else min(allocated(folder), size)))
    if plan.method.calibration:
        folder, size = work / "calibration", _calibration_bytes(plan)
        needs.append(Need("calibration", folder, size, 0 if overwrite else min(allocated(folder), size)))
    if overwrite:
        needs.append(Need("unfinished run", out, 0, allocated(work)))
    missing = sum(model.missing_bytes for model in plan.models)
    if missing and downloads is not None:
        needs.append(Need("downloads", downloads, missing))
    return needs


def hub_cache(plan: MergePlan) -> Path | None:
    """Where models on the Hub are downloaded to; None where none is, or all of it is there."""
    if not any(model.missing_bytes for model in plan.models):
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _written(shards: Sequence[Shard], out: Path) -> int:
    """What an unfinished run has written or reserved of the shards."""
    return sum(blocks_of(out / WORK_DIR / shard.file) for shard in shards if (out / WORK_DIR / shard.file).is_file())


def _side_files(plan: MergePlan) -> int:
    files = plan.base.files
    if files.folder is None:
        return sum(files.size(name) for name in plan.base.side_files())
    return sum((files.folder / name).stat().st_size for name in plan.base.side_files())


def _calibration_bytes(plan: MergePlan) -> int:
    """An upper estimate: of the inputs, what `rows` tokens of every matrix in every model take; of others, little."""
    settings, measured = plan.recipe.calibration, plan.method.calibration
    matrices = [tensor for tensor in plan.contexts if tensor.block is not None and tensor.is_matrix]
    size = _FEW + sum(4 * tensor.columns for tensor in matrices)
    if "inputs" in measured:
        size += 4 * len(plan.models) * settings.rows * sum(tensor.columns for tensor in matrices)
    if "sensitivity" in measured:
        of_fisher = plan.recipe.fisher.model_copy(update={"samples": settings.samples, "length": settings.length})
        size += max(fisher_disk(model, of_fisher).scratch for model in plan.models)
    return size
