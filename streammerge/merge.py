"""The whole job: plan, Fisher, survey and merge, publish. Nothing half-done looks done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from streammerge._version import __version__
from streammerge.budget import DEFAULT_MAX_RAM
from streammerge.checkpoints.checkpoint import CARD_FILE, MANIFEST_FILE, Checkpoint
from streammerge.checkpoints.locate import require_pinned
from streammerge.checkpoints.output import WORK_DIR, check_output
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher import check as check_fisher
from streammerge.fisher import fisher as measure_fisher
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.store import FISHER_FILE, FisherRecord, check_same_base, open_fisher
from streammerge.plan import MergePlan, plan
from streammerge.recipe import Recipe
from streammerge.report import manifest, model_card, resolved_recipe


def merge(
    recipe: Recipe | Mapping[str, Any],
    out: str | Path,
    *,
    max_ram: int = DEFAULT_MAX_RAM,
    threads: int | None = None,
    device: str | None = None,
    max_vram: int | None = None,
    device_map: str = "auto",
    trust_remote_code: bool = False,
    save_fisher: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Merge fine-tuned models into a base model and write a checkpoint that transformers loads.

    Interrupted, the same call goes on behind the last finished tensor, or decoder block of the Fisher.

    Args:
        recipe: what to merge; a mapping is read as one, with the keys of `Recipe`.
        out: the output folder; new, empty, or left unfinished by the same call.
        max_ram: bytes for buffers and temporaries of the merge, on top of what importing torch takes.
        threads: workers; the processors by default, at most 8.
        device: where a Fisher pass runs: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        max_vram, device_map, trust_remote_code: of a Fisher pass, see `fisher`.
        save_fisher: folder to keep a newly measured Fisher in, for other merges of the same base.
        overwrite: replace a finished merge in `out`, or start an unfinished one anew.
        progress: show progress bars on standard error.

    Returns:
        The manifest, as written to `streammerge.json`.

    Raises:
        StreammergeError: see `streammerge.errors`. Bad input leaves nothing behind in `out`.
    """
    from streammerge.engine import Engine  # imports torch

    out = Path(out)
    with ExitStack() as stack:
        run = FisherRun(device, max_vram, device_map, trust_remote_code)
        job = stack.enter_context(plan(recipe, max_ram=max_ram, threads=threads))
        if trust_remote_code:
            require_pinned(job.recipe.base)
        check_output(out, [model.folder for model in (job.base, *job.experts)], overwrite)
        sources = _sources(job)
        if job.fisher is not None:
            check_same_base(job.fisher[1], job.base, sources[0]["fingerprint"])
        if save_fisher is not None and job.fisher is not None:
            raise RecipeError("a Fisher is reused, so there is no new one to save: give one of the two folders")
        if save_fisher is not None and not job.method.needs_fisher:
            raise RecipeError(f"method {job.recipe.method} with these parameters uses no Fisher to save")
        if save_fisher is not None and not _is_finished(Path(save_fisher)):
            check_output(Path(save_fisher), [job.base.folder, out], overwrite=False)
        identity = {"version": __version__, "recipe": resolved_recipe(job), "sources": sources}
        fisher = Path(save_fisher) if save_fisher is not None else out / WORK_DIR / "fisher"
        measures = job.method.needs_fisher and job.fisher is None
        if measures and save_fisher is not None and _is_finished(fisher):
            job.fisher = _left_fisher(job, fisher, sources[0]["fingerprint"])
            stack.enter_context(job.fisher[0])
        elif measures:
            check_fisher(job.base, job.recipe.fisher, run)
        writer = stack.enter_context(CheckpointWriter(out, job.shards, identity, fresh=overwrite))
        try:
            if measures and job.fisher is None:
                if not _is_finished(fisher):
                    _measure(job, fisher, run, overwrite, progress)
                job.fisher = _left_fisher(job, fisher, sources[0]["fingerprint"])
                stack.enter_context(job.fisher[0])
            method, entries = Engine(job, writer, progress).run()
            result = manifest(job, method, sources, entries, writer.finished)
            files: dict[str, bytes | Path] = {name: job.base.folder / name for name in job.base.side_files()}
            files |= {CARD_FILE: model_card(job, result).encode()}
            result["files"] = sorted({*files, MANIFEST_FILE, *result["files"]})
            writer.publish(files | {MANIFEST_FILE: _as_json(result)})
        except (CheckpointError, RecipeError):
            writer.discard()  # the input is at fault, running again would not help
            raise
    return result


def _is_finished(fisher: Path) -> bool:
    return (fisher / FISHER_FILE).is_file() and not (fisher / WORK_DIR).exists()


def _measure(job: MergePlan, folder: Path, run: FisherRun, overwrite: bool, progress: bool) -> None:
    measure_fisher(
        job.base,
        folder,
        job.recipe.fisher,
        device=run.device,
        max_vram=run.max_vram,
        device_map=run.device_map,
        trust_remote_code=run.trust_remote_code,
        max_shard_bytes=job.recipe.max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _left_fisher(job: MergePlan, folder: Path, fingerprint: str) -> tuple[Checkpoint, FisherRecord]:
    """The Fisher in `folder`, by this or an earlier run."""
    fisher = open_fisher(folder, job.base, job.recipe.fisher, [tensor.name for tensor in job.surveyed])
    try:
        check_same_base(fisher[1], job.base, fingerprint)
    except BaseException:
        fisher[0].close()
        raise
    return fisher


def _sources(job: MergePlan) -> list[dict[str, Any]]:
    models = [("base", job.base), *(("expert", expert) for expert in job.experts)]
    if job.fisher is not None:
        models.append(("fisher", job.fisher[0]))
    return [
        {"role": role, "id": model.id, "revision": model.revision, "fingerprint": model.fingerprint()}
        for role, model in models
    ]


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"
