"""The work of a sweep: check all points, measure the Fisher, then merge, score and drop one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge._version import __version__
from streammerge.calibration.store import text_digests
from streammerge.checkpoints import disk
from streammerge.checkpoints.output import transfer_errors
from streammerge.errors import RecipeError
from streammerge.figures import GET_IT, can_draw
from streammerge.fisher import fisher as measure_fisher
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.store import is_finished
from streammerge.hub.pull import HubMode
from streammerge.merge import merge
from streammerge.plan import MergePlan, plan
from streammerge.progress import say, tell
from streammerge.recipe import Recipe, RecipeLike, make_recipe, resolve_method
from streammerge.report import resolved_recipe
from streammerge.sweep.evaluations import Evaluate, scored
from streammerge.sweep.grid import Grid, Point, points, told
from streammerge.sweep.state import FISHER_FOLDER, PAGE_FILE, PICTURE_FILE, SweepFolder
from streammerge.sweep.text import pareto_front, sweep_markdown, sweep_plot


@dataclass(frozen=True)
class Job:
    """What a sweep is asked for; see `sweep`."""

    recipe: RecipeLike
    grid: Grid
    out: Path
    evaluate: Evaluate
    evaluation: str
    limit: int | None
    one_by_one: bool


@dataclass(frozen=True)
class Checked:
    """A point that can be merged.

    Attributes:
        fishers: how many Fishers it reads, the base's first.
        reads_text: whether its method measures something on a calibration text.
    """

    point: Point
    recipe: Recipe
    fishers: int
    reads_text: bool


class Run:
    """One run of a sweep; see `sweep`."""

    def __init__(
        self,
        job: Job,
        fisher_run: FisherRun,
        max_ram: int | str,
        threads: int | None,
        hub_mode: HubMode,
        keep_merged: bool,
        progress: bool,
    ) -> None:
        self.job, self.fisher_run = job, fisher_run
        self.max_ram, self.threads, self.hub_mode = max_ram, threads, hub_mode
        self.keep_merged, self.progress = keep_merged, progress
        self.sources: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._inputs: list[Path | None] = []

    def run(self) -> dict[str, Any]:
        """Everything; what `sweep` returns."""
        base = make_recipe(self.job.recipe)
        checked = self._check(base)
        with ExitStack() as stack:
            folder = SweepFolder(self.job.out, self._identity(base), self._inputs)
            stack.enter_context(folder.locked())
            left = [point for point in checked if point.point.name not in folder.done]
            if self.progress and len(left) < len(checked):
                say(f"{len(checked) - len(left)} of {len(checked)} points are done already")
            fishers = [] if base.fisher_from else self._fishers(base, max((c.fishers for c in left), default=0))
            for number, point in enumerate(checked, 1):
                name = point.point.name
                if name not in folder.done:
                    if self.progress:
                        say(f"point {number} of {len(checked)}: {point.point.label}")
                    self._merge(folder, point, fishers)
                    scores = scored(self.job.evaluate, folder.merged(name), self.job.limit, self.progress)
                    folder.record(name, point.point.settings, scores)
                if not self.keep_merged:
                    folder.drop(name)
            return self._found(folder, checked)

    def _check(self, base: Recipe) -> list[Checked]:
        """Plan every point, from headers alone."""
        values = base.model_dump(exclude_unset=True)
        checked: list[Checked] = []
        known: dict[str, Point] = {}
        alike: list[str] = []
        for point in points(values, self.job.grid, one_by_one=self.job.one_by_one):
            try:
                recipe = _without_useless(point.recipe)
                with plan(recipe, max_ram=self.max_ram, threads=self.threads, hub_mode=self.hub_mode) as planned:
                    found = Checked(point, recipe, len(planned.of_fishers), bool(planned.method.calibration))
                    self._look(planned)
                    same = json.dumps(resolved_recipe(planned), sort_keys=True)
            except RecipeError as error:
                raise RecipeError(f"point {point.label}: {error}") from None
            if same not in known:
                checked.append(found)
                known[same] = point
            elif known[same].settings:
                alike.append(_alike(known[same], point))
            else:
                self.notes.append(f"{point.label} is {known[same].label}, which stands for it")
        if (base.fisher_from or "fisher" in values) and not any(point.fishers for point in checked):
            raise RecipeError("no point of this sweep reads a Fisher: leave fisher and fisher_from out of the recipe")
        of_texts = [key for key in self.job.grid if key.startswith("calibration.")]
        if of_texts and not any(point.reads_text for point in checked):
            raise RecipeError(f"--set {of_texts[0]}: no point of this sweep reads a calibration text: leave it out")
        if alike:
            raise RecipeError(alike[0])
        return checked

    def _look(self, planned: MergePlan) -> None:
        """Note the models, which all points share."""
        if self.sources:
            return
        roles = ["base", *("expert" for _ in planned.experts)]
        self._inputs = [model.folder for model in planned.models]
        self.sources = [
            {"role": role, "id": m.id, "revision": m.revision, "fingerprint": m.fingerprint(), "files": m.stamps()}
            for role, m in zip(roles, planned.models, strict=True)
        ]

    def _identity(self, base: Recipe) -> dict[str, Any]:
        return {
            "version": __version__,
            "recipe": base.model_dump(),
            "sources": self.sources,
            "texts": text_digests(base.calibration),
            "evaluation": self.job.evaluation,
            "limit": self.job.limit,
        }

    def _fishers(self, base: Recipe, count: int) -> list[Path]:
        """The folders of the Fishers, each measured unless it is there."""
        names = [base.base, *(spec.model for spec in base.models)][:count]
        folders = [self.job.out / (f"{FISHER_FOLDER}-{i}" if i else FISHER_FOLDER) for i in range(count)]
        for name, folder in zip(names, folders, strict=True):
            if not is_finished(folder):
                run = self.fisher_run
                measure_fisher(
                    name,
                    folder,
                    base.fisher,
                    hub_mode=self.hub_mode,
                    device=run.device,
                    max_vram=run.max_vram,
                    device_map=run.device_map,
                    trust_remote_code=run.trust_remote_code,
                    progress=self.progress,
                )
        return folders

    def _merge(self, folder: SweepFolder, checked: Checked, fishers: Sequence[Path]) -> None:
        name, recipe = checked.point.name, checked.recipe
        if folder.is_merged(name):
            return
        if fishers and checked.fishers:
            recipe = recipe.model_copy(update={"fisher_from": [str(path) for path in fishers[: checked.fishers]]})
        run = self.fisher_run
        merge(
            recipe,
            folder.merged(name),
            max_ram=self.max_ram,
            threads=self.threads,
            hub_mode=self.hub_mode,
            device=run.device,
            max_vram=run.max_vram,
            device_map=run.device_map,
            trust_remote_code=run.trust_remote_code,
            report=self.keep_merged,
            progress=self.progress,
        )

    def _found(self, folder: SweepFolder, checked: Sequence[Checked]) -> dict[str, Any]:
        """What all points together say; written too."""
        done = [folder.done[c.point.name] for c in checked]
        front = pareto_front([(d["scores"]["accuracy"], d["scores"]["mean_length"]) for d in done])
        removed = (
            "each merged model was removed once it was scored; its manifest is in points (--keep-merged keeps both)"
        )
        result = {
            "version": __version__,
            "evaluation": self.job.evaluation,
            "limit": self.job.limit,
            "grid": {key: list(values) for key, values in self.job.grid.items()},
            "sources": [{key: source[key] for key in ("role", "id", "revision")} for source in self.sources],
            "points": [
                {"point": c.point.name, **d, "front": best} for c, d, best in zip(checked, done, front, strict=True)
            ],
            "notes": self.notes + ([] if self.keep_merged else [removed]),
        }
        with transfer_errors(folder.folder, "its tables cannot be written"):
            if can_draw():
                disk.replace_file(folder.folder / PICTURE_FILE, sweep_plot(result))
            else:
                disk.remove(folder.folder / PICTURE_FILE)
                tell(f"no {PICTURE_FILE}, which takes matplotlib: {GET_IT}")
            page = sweep_markdown(result, PICTURE_FILE if can_draw() else None)
            disk.replace_file(folder.folder / PAGE_FILE, page.encode())
        folder.write(**result)
        return result


def _alike(first: Point, second: Point) -> str:
    """What to say of two points that are one merge."""
    own = second.settings.items()
    out = [
        f"{told(v)} out of {key}" for key, v in own if key not in first.settings or told(first.settings[key]) != told(v)
    ]
    return f"two points are one and the same merge: {first.label}; and {second.label}: leave {' or '.join(out)}"


def _without_useless(values: Mapping[str, Any]) -> Recipe:
    """The point's recipe without a Fisher or a text that its method does not read: another point's does."""
    recipe = make_recipe(values)
    method = resolve_method(recipe, parameter_count=0).method  # which matters for a density alone
    drop = set() if method.needs_fisher else {"fisher", "fisher_from"}
    drop |= set() if method.calibration else {"calibration"}
    return make_recipe({key: value for key, value in values.items() if key not in drop})
