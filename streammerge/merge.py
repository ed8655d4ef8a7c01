"""The whole job: plan, Fisher, survey and merge, publish. Nothing half-done looks done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge._version import __version__
from streammerge.budget import DEFAULT_MAX_RAM
from streammerge.calibration import calibrate
from streammerge.calibration import check as check_calibration
from streammerge.calibration.store import text_digests
from streammerge.checkpoints.checkpoint import CARD_FILE, MANIFEST_FILE, PLOT_FILE, Checkpoint
from streammerge.checkpoints.disk_space import require_room
from streammerge.checkpoints.layout import index_files
from streammerge.checkpoints.locate import require_pinned
from streammerge.checkpoints.output import WORK_DIR, check_output, void_with_inputs
from streammerge.checkpoints.writer import CheckpointWriter, nothing_elsewhere
from streammerge.errors import RecipeError
from streammerge.fisher import check as check_fisher
from streammerge.fisher import fisher as measure_fisher
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.store import FisherRecord, check_same_base, is_finished, open_fisher
from streammerge.heap import give_back, large_imports
from streammerge.host import memory_errors, require_memory
from streammerge.hub.card import Licence, coefficient_plot, model_card, stated_licence
from streammerge.hub.commit import Pushed
from streammerge.hub.publication import Publication, make_publication
from streammerge.hub.pull import HubMode
from streammerge.hub.settings import PushSettings
from streammerge.hub.xet import transfers
from streammerge.needs import hub_cache, merge_needs
from streammerge.plan import MergePlan, plan
from streammerge.recipe import RecipeLike
from streammerge.report import file_entry, manifest, resolved_recipe, seal
from streammerge.report.drawing import draw_report
from streammerge.timeline import Timeline


def merge(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    push_to_hub: str | PushSettings | Mapping[str, Any] | None = None,
    max_ram: int | str = DEFAULT_MAX_RAM,
    threads: int | None = None,
    hub_mode: HubMode = "cache",
    device: str | None = None,
    max_vram: int | None = None,
    device_map: str = "auto",
    trust_remote_code: bool = False,
    save_fisher: str | Path | None = None,
    overwrite: bool = False,
    check_disk: bool = True,
    report: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Merge fine-tuned models into a base model and write a checkpoint that transformers loads.

    Interrupted, the same call goes on behind the last finished tensor, or decoder block of the Fisher.

    With `push_to_hub` each shard is uploaded while the next is merged, and at the end one commit makes all of the
    model visible. Without `out` a shard goes from the disk once it is uploaded, so that at most two lie there; the
    work folder is then in huggingface_hub's `HF_ASSETS_CACHE`, and goes with the commit.

    Args:
        recipe: what to merge; a mapping is read as one, with the keys of `Recipe`, and a path as that of a YAML file.
        out: the output folder; new, empty, or left unfinished by the same call. May be left out with `push_to_hub`.
        push_to_hub: the repository, org/name, or a mapping with the keys of `PushSettings`.
        max_ram: bytes for buffers and temporaries of the merge, on top of what importing torch takes; or a size such as
            "256MiB".
        threads: workers; the processors by default, at most 8. Where all models are local folders, on Linux, each is a
            process, a fork of this one that ends with the merge; else a thread.
        hub_mode: how models on the Hub are read: "cache" downloads their files into huggingface_hub's cache as they
            are needed, "stream" reads byte ranges only and keeps nothing. The result is the same.
        device: where a Fisher pass runs: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        max_vram, device_map, trust_remote_code: of a Fisher pass, see `fisher`.
        save_fisher: folder to keep a newly measured Fisher in, for other merges of the same base.
        overwrite: replace a finished merge in `out`, or start an unfinished one anew.
        check_disk: refuse to begin where a disk says that it has no room for all that will be written.
        report: leave `report.html` beside the manifest, which does not name it: figures and tables for a person, with
            this run's times and memory. It takes the extra `plot`.
        progress: show progress bars on standard error.

    Returns:
        The manifest, as written to `streammerge.json`; with `push_to_hub` also "push": {"url", "commit",
        "pull_request": refs/pr/N or None, "new": False where the very model was there already}.

    Raises:
        StreammergeError: see `streammerge.errors`. Bad input leaves nothing behind in `out`.
    """
    push = make_publication(push_to_hub)
    keep = out is not None
    if out is None:
        if push is None:
            raise RecipeError("nowhere to put the result: give an output folder, or a repository to push it to")
        out = push.folder()
    out, timeline = Path(out), Timeline()
    with ExitStack() as stack:
        run = FisherRun(device, max_vram, device_map, trust_remote_code)
        if push is not None:
            stack.callback(push.tidy)
            stack.callback(push.close)
            push.check(keep=keep)
        with timeline.phase("plan"):
            planned = plan(
                recipe, max_ram=max_ram, threads=threads, hub_mode=hub_mode, uploads=push is not None, progress=progress
            )
        job = stack.enter_context(planned)
        stack.enter_context(transfers(by_xet=job.xet_bytes > 0))
        if trust_remote_code:
            require_pinned(job.recipe.base)
        if push is not None:
            push.check_merge(job, out if keep else None, overwrite=overwrite)
        check_output(out, [model.folder for model in (job.base, *job.experts)], overwrite)
        sources = _sources(job)
        unmeasured = _check_fishers(job, out, save_fisher, sources, run)
        if job.method.calibration:
            check_calibration(job.models, job.recipe.calibration, run)
        _require_resources(job, run, out, save_fisher, keep=keep, overwrite=overwrite, check_disk=check_disk)
        licences = [stated_licence(model) for model in job.models]
        inputs = job.checkpoints
        identity = _identity(job, inputs, sources)
        elsewhere = push.uploaded_before if push is not None else nothing_elsewhere
        label = f"push to {push.settings.where}" if push is not None and not keep else None
        writer = stack.enter_context(
            CheckpointWriter(out, job.shards, identity, fresh=overwrite, elsewhere=elsewhere, label=label)
        )
        complete_before = len(writer.entries)
        with void_with_inputs(inputs, writer.discard):
            if push is not None:
                stack.enter_context(push.begin(writer, keep=keep, progress=progress))
            for number, (folder, model) in enumerate(unmeasured):
                if not is_finished(folder):
                    with timeline.phase("Fisher"):
                        _measure(job, model, folder, run, overwrite, check_disk, progress)
                job.fishers.append(_left_fisher(job, model, folder, sources[number]["fingerprint"]))
                stack.enter_context(job.fishers[-1][0])
            if job.method.calibration:
                with timeline.phase("calibration"):
                    job.calibrated = calibrate(
                        job.models,
                        job.recipe.calibration,
                        job.method.calibration,
                        out / WORK_DIR / "calibration",
                        run,
                        progress=progress,
                    )
            if unmeasured or job.method.calibration:
                give_back()  # the models that were walked
            result, files, pushed = _write(job, writer, sources, licences, push, timeline, progress)
            if keep:
                writer.publish(files, draw_report(result, timeline.phases, complete_before) if report else None)
            else:
                writer.discard()
    return result if pushed is None else {**result, "push": asdict(pushed)}


def _identity(job: MergePlan, inputs: Sequence[Checkpoint], sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What the bytes of the merge depend on."""
    return {
        "version": __version__,
        "recipe": resolved_recipe(job),
        "sources": [{**source, "files": model.stamps()} for source, model in zip(sources, inputs, strict=True)],
        "texts": text_digests(job.recipe.calibration),
    }


def _write(
    job: MergePlan,
    writer: CheckpointWriter,
    sources: list[dict[str, Any]],
    licences: list[Licence],
    push: Publication | None,
    timeline: Timeline,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, bytes | Path], Pushed | None]:
    """Merge all tensors and, with a push, commit them; the manifest, all files beside shards and index, the commit."""
    with large_imports():
        from streammerge.engine import Engine  # imports torch

    while True:
        with memory_errors(
            "the merge", "give a smaller --max-ram or fewer --threads; the same command goes on where it was"
        ):
            room = push.room if push is not None else None
            method, entries = Engine(job, writer, progress, room, timeline=timeline).run()
        for model in job.checkpoints:
            model.require_unchanged()  # before anything of it becomes visible
        result = manifest(job, method, sources, entries, writer.finished)
        files = _other_files(job, result, licences)
        if push is None:
            return result, files, None
        with timeline.phase("commit"):
            pushed = push.commit({**files, **index_files(job.shards)}, f"Upload a merge by {job.recipe.method}")
        if pushed is not None:
            return result, files, pushed


def _other_files(job: MergePlan, result: dict[str, Any], licences: list[Licence]) -> dict[str, bytes | Path]:
    """Everything beside shards and index; completes the manifest: all names, their SHA-256, its own."""
    files: dict[str, bytes | Path] = {name: job.base.files.path(name) for name in job.base.side_files()}
    if (plot := coefficient_plot(result)) is not None:
        files[PLOT_FILE] = plot
    result["files"] = sorted({*files, CARD_FILE, MANIFEST_FILE, *result["files"]})
    files[CARD_FILE] = model_card(job, result, licences).encode()
    beside = {**files, **index_files(job.shards)}
    result["other_files"] = {name: file_entry(beside[name]) for name in sorted(beside)}
    return {**files, MANIFEST_FILE: seal(result)}


def _require_resources(
    job: MergePlan,
    run: FisherRun,
    out: Path,
    save_fisher: str | Path | None,
    *,
    keep: bool,
    overwrite: bool,
    check_disk: bool,
) -> None:
    """Refuse a merge for which there is not enough memory or disk, before the first byte is written."""
    summary = job.summary(run)
    passes = summary["peak_host_bytes"] > summary["peak_merge_bytes"]
    measured = "fisher" if summary["fisher_placement"] else "calibration"
    advice = f"take fewer or shorter texts (--{measured}-samples, --{measured}-length)" if passes else "lower --max-ram"
    require_memory(summary["peak_host_bytes"], "this merge", advice)
    if check_disk:
        where = "choose another --out" if keep else "set HF_ASSETS_CACHE to a folder on another disk"
        advice = (
            f"{where}, or take less: --hub-mode stream downloads nothing, --push-to-hub without --out keeps two shards"
        )
        folder = Path(save_fisher) if save_fisher is not None else None
        needs = merge_needs(job, out, downloads=hub_cache(job), save_fisher=folder, keep=keep, overwrite=overwrite)
        require_room(needs, advice)


def _check_fishers(
    job: MergePlan, out: Path, save_fisher: str | Path | None, sources: list[dict[str, Any]], run: FisherRun
) -> list[tuple[Path, Checkpoint]]:
    """The Fishers still to be measured, or that an earlier run has measured: folder and model of each."""
    for number, (_, record) in enumerate(job.fishers):
        check_same_base(record, job.models[number], sources[number]["fingerprint"])
    if save_fisher is not None:
        _check_save_fisher(job, Path(save_fisher), out)
    folders = [out / WORK_DIR / f"fisher-{number}" for number in range(len(job.of_fishers))]
    if save_fisher is not None:
        folders[0] = Path(save_fisher)
    unmeasured = [] if job.fishers else [*zip(folders, job.of_fishers, strict=True)]
    for folder, model in unmeasured:
        if save_fisher is None or not is_finished(folder):
            check_fisher(model, job.recipe.fisher, run)
    return unmeasured


def _check_save_fisher(job: MergePlan, folder: Path, out: Path) -> None:
    if job.fishers:
        raise RecipeError("a Fisher is reused, so there is no new one to save: give one of the two folders")
    if not job.method.needs_fisher:
        raise RecipeError(f"method {job.recipe.method} with these parameters uses no Fisher to save")
    if job.method.fisher_of_experts:
        raise RecipeError(
            f"method {job.recipe.method} measures a Fisher of every model, and --save-fisher keeps one: make each with "
            "`streammerge fisher` and give them with --fisher"
        )
    if not is_finished(folder):
        check_output(folder, [job.base.folder, out], overwrite=False, manifest=None, option="--save-fisher")


def _measure(
    job: MergePlan, model: Checkpoint, folder: Path, run: FisherRun, overwrite: bool, check_disk: bool, progress: bool
) -> None:
    measure_fisher(
        model,
        folder,
        job.recipe.fisher,
        device=run.device,
        max_vram=run.max_vram,
        device_map=run.device_map,
        trust_remote_code=run.trust_remote_code,
        max_shard_bytes=job.recipe.max_shard_bytes,
        overwrite=overwrite,
        check_disk=check_disk,
        progress=progress,
    )


def _left_fisher(job: MergePlan, model: Checkpoint, folder: Path, fingerprint: str) -> tuple[Checkpoint, FisherRecord]:
    """The model's Fisher in `folder`, by this or an earlier run."""
    fisher = open_fisher(folder, model, job.recipe.fisher, job.with_fisher)
    try:
        check_same_base(fisher[1], model, fingerprint)
    except BaseException:
        fisher[0].close()
        raise
    return fisher


def _sources(job: MergePlan) -> list[dict[str, Any]]:
    models = [("base", job.base), *(("expert", expert) for expert in job.experts)]
    models += [("fisher", fisher) for fisher, _ in job.fishers]
    return [
        {"role": role, "id": model.id, "revision": model.revision, "fingerprint": model.fingerprint()}
        for role, model in models
    ]
