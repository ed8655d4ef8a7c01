"""Recipe + headers -> MergePlan: every check and every byte of the layout, before any data is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from streammerge.actions import Action, action_on, surveyed, units_of, with_fisher
from streammerge.budget import (
    DEFAULT_MAX_RAM,
    FORK_BYTES,
    IMPORT_BYTES,
    MOST_KEPT,
    WORTH_FORKING,
    Budget,
    make_budget,
    unit_bytes,
)
from streammerge.calibration import CalibrationCost, calibration_cost
from streammerge.calibration.store import Calibrated, check_texts
from streammerge.checkpoints.checkpoint import CARD_FILE, Checkpoint, block_index, decoder_prefix
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.layout import Shard, plan_shards
from streammerge.checkpoints.locate import open_model
from streammerge.compatibility import Match, match_experts, refuse_quantised, same_model_notes
from streammerge.errors import MemoryBudgetError, RecipeError
from streammerge.fisher import FisherPlacement, place
from streammerge.fisher.placement import IMPORT_BYTES as WITH_TRANSFORMERS
from streammerge.fisher.placement import FisherRun
from streammerge.fisher.store import STORED_AS, FisherRecord, FisherSettings, open_fisher
from streammerge.hub.pull import HubMode
from streammerge.hub.xet import CLIENT_BYTES, ram_for_xet, xet_share
from streammerge.jobs import can_fork
from streammerge.methods.api import Method, TensorContext, Unit
from streammerge.recipe import Recipe, RecipeLike, Resolved, make_recipe, resolve_method
from streammerge.tokenizers import tokenizer_notes
from streammerge.travel import Travel
from streammerge.units import parse_size


@dataclass
class MergePlan:
    """Everything a merge will do. Use as a context manager: it holds the inputs open.

    Attributes:
        recipe: the recipe.
        base, experts: the checkpoints.
        matches: each expert's tensors under the base's names.
        fishers: the Fishers the method reads, with their records, the base's first; none yet where they are to be
            measured.
        calibrated: what was measured on a calibration text, once it is.
        resolved: the method with every parameter filled in.
        actions: what is done with each output tensor, by name.
        units: the work, in output order.
        shards: the output's layout.
        budget: memory of the merge.
        notes: what a user should know and need not mend.
        uploads: whether shards are uploaded meanwhile.
        xet_bytes: what hf_xet gets of the budget; 0: files travel without it.
        opened: bytes that came over the network to make the plan.
    """

    recipe: Recipe
    base: Checkpoint
    experts: list[Checkpoint]
    matches: list[Match]
    fishers: list[tuple[Checkpoint, FisherRecord]]
    resolved: Resolved
    actions: dict[str, Action]
    units: list[Unit]
    shards: tuple[Shard, ...]
    budget: Budget
    notes: list[str]
    uploads: bool = False
    xet_bytes: int = 0

    def __post_init__(self) -> None:
        self.calibrated: Calibrated | None = None
        self.opened = sum(model.files.transferred for model in self.models)
        self._open = ExitStack()

    @property
    def method(self) -> Method:
        return self.resolved.method

    @property
    def models(self) -> list[Checkpoint]:
        """The base and the fine-tuned models."""
        return [self.base, *self.experts]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that is read: the models, and the Fishers as far as they are there."""
        return [*self.models, *(fisher for fisher, _ in self.fishers)]

    @property
    def of_fishers(self) -> list[Checkpoint]:
        """The models whose Fishers the method needs."""
        if not self.method.needs_fisher:
            return []
        return self.models if self.method.fisher_of_experts else [self.base]

    @property
    def with_fisher(self) -> list[str]:
        """The tensors that a Fisher must hold."""
        return with_fisher(self.contexts, self.actions, self.method)

    @property
    def contexts(self) -> list[TensorContext]:
        return [tensor for unit in self.units for tensor in unit.tensors]

    @property
    def surveyed(self) -> list[TensorContext]:
        """The tensors the method looks at before it merges anything."""
        return surveyed(self.contexts, self.actions, self.method)

    def passes(self, unit: Unit) -> int:
        """How often the unit is gone through at most, the writing one included."""
        merged = self.actions[unit.tensors[0].name] == "merge"
        return 1 + (sum(step.reads_rows and not step.spare for step in self.method.passes(unit)) if merged else 0)

    def inputs(self, tensor: TensorContext) -> list[TensorInfo]:
        """The tensor in the base, the experts that are read for it and, where it is read, the Fisher."""
        base = self.base.tensors[tensor.name]
        infos = [base, *(info for _, info in self.expert_inputs(tensor))]
        if self.reads_fisher(tensor):
            infos += self._fisher_infos(base)
        return infos

    def expert_inputs(self, tensor: TensorContext) -> list[tuple[Checkpoint, TensorInfo]]:
        """The tensor in the experts. Where the base's is copied they are read for NaN and Inf alone."""
        if self.actions[tensor.name] == "copy" and self.recipe.allow_nonfinite:
            return []
        models = zip(self.experts, self.matches, strict=True)
        return [(model, match.tensors[tensor.name]) for model, match in models if tensor.name in match.tensors]

    def reads_fisher(self, tensor: TensorContext) -> bool:
        return self.actions[tensor.name] == "merge" and self.method.reads_fisher(tensor)

    def survey_inputs(self, tensor: TensorContext) -> list[TensorInfo]:
        """The tensor in every checkpoint that the method's survey reads."""
        base = self.base.tensors[tensor.name]
        infos = [base, *(match.tensors[tensor.name] for match in self.matches)]
        survey = self.method.survey(tensor)
        return infos + self._fisher_infos(base) if survey and survey.reads_fisher else infos

    def _fisher_infos(self, base: TensorInfo) -> list[TensorInfo]:
        """The tensor in every Fisher; before they are measured, entries of the size it will have."""
        if self.fishers:
            return [fisher.info(base.name) for fisher, _ in self.fishers]
        dtype = self.recipe.fisher.dtype or "bfloat16"
        width = 4 if dtype == "float32" else 2
        return [TensorInfo(base.name, STORED_AS[dtype], base.shape, "", 0, width * base.numel)] * len(self.of_fishers)

    def survey_bytes(self, unit: Unit) -> int:
        """What the survey of a unit reads."""
        return sum(info.nbytes for tensor in unit.tensors for info in self.survey_inputs(tensor))

    def merge_bytes(self, unit: Unit) -> int:
        """What the merge of a unit reads at most: once where it fits the buffer, else once per pass."""
        return self._readings(unit) * sum(info.nbytes for tensor in unit.tensors for info in self.inputs(tensor))

    def _readings(self, unit: Unit) -> int:
        inputs = {tensor.name: self.inputs(tensor) for tensor in unit.tensors}
        return 1 if unit_bytes(unit, inputs) <= self.budget.buffer_bytes else self.passes(unit)

    def bytes_to_read(self) -> int:
        """What survey and merge read together, at most; a Fisher pass reads the base's blocks twice besides."""
        surveys = sum(self.survey_bytes(Unit(tensor.name, (tensor,))) for tensor in self.surveyed)
        return surveys + sum(self.merge_bytes(unit) for unit in self.units)

    @property
    def by_forks(self) -> bool:
        """Whether several workers are forks of this process: where bytes come over the network they are threads."""
        local = not self.uploads and all(model.is_local for model in self.checkpoints)
        return self.budget.workers > 1 and local and self.bytes_to_read() >= WORTH_FORKING and can_fork()

    def travel(self, fishers: Sequence[FisherPlacement], calibration: CalibrationCost | None) -> Travel | None:
        """What comes over the network; None where no model is on the Hub.

        Args:
            fishers: of the Fishers that are to be measured.
            calibration: where there is one.
        """
        hub = [model for model in self.models if model.revision is not None]
        if not hub:
            return None
        walked = hub if calibration or self.method.fisher_of_experts else [m for m in hub if m is self.base and fishers]
        code = [(m, name) for m in walked for name in m.files.top() if m is not self.base and name.endswith(".py")]
        cards = [(model, CARD_FILE) for model in hub if model.folder is None and model.files.has(CARD_FILE)]  # licences
        files = [*((self.base, name) for name in self.base.side_files()), *code, *cards]
        return Travel(
            opened=self.opened,
            fingerprints=sum(model.fingerprint_bytes() for model in hub),
            downloads=sum(model.missing_bytes for model in hub),
            fisher=sum(fisher.bytes_to_stream for fisher in fishers),
            calibration=calibration.bytes_to_stream if calibration else 0,
            survey=sum(self._streamed(tensor) for tensor in self.surveyed),
            merge=sum(self._readings(unit) * sum(map(self._streamed, unit.tensors)) for unit in self.units),
            files=sum(model.files.size(name) for model, name in files),
            size=sum(info.nbytes for model in hub for info in model.tensors.values()),
            at_most=calibration is not None or any(self._readings(unit) > 1 for unit in self.units),
        )

    def _streamed(self, tensor: TensorContext) -> int:
        """What comes over the network when a tensor is read once."""
        inputs = [(self.base, self.base.tensors[tensor.name]), *self.expert_inputs(tensor)]
        return sum(info.nbytes for model, info in inputs if model.is_streamed(info))

    def summary(self, run: FisherRun | None = None) -> dict[str, Any]:
        """What `streammerge plan` prints.

        Args:
            run: how a Fisher pass would be run.
        """
        run = run or FisherRun()
        measured = [] if self.fishers else self.of_fishers
        placed = [place(model, self.recipe.fisher, run) for model in measured]
        calibration = self._calibration_cost()
        travel = self.travel(placed, calibration)
        beside = self.xet_bytes + (CLIENT_BYTES if self.uploads else 0)
        hosted = [fisher.host_bytes for fisher in placed] + ([calibration.host_bytes] if calibration else [])
        passes_host = [beside + size for size in hosted]
        imported = WITH_TRANSFORMERS if hosted else IMPORT_BYTES  # one process does it all
        merges = imported + self.budget.total + beside + (self.budget.workers * FORK_BYTES if self.by_forks else 0)
        return {
            "method": self.recipe.method,
            "parameters_of_method": self.resolved.parameters,
            "aim": self.recipe.aim,
            "base": self.base.id,
            "models": [
                {"model": expert.id, **values}
                for expert, values in zip(self.experts, self.resolved.experts, strict=True)
            ],
            "tensors": len(self.contexts),
            "parameters": sum(tensor.numel for tensor in self.contexts),
            "merged": sum(action == "merge" for action in self.actions.values()),
            "copied": sum(action != "merge" for action in self.actions.values()),
            "passes": max(self.passes(unit) for unit in self.units),
            "bytes_to_read": self.bytes_to_read(),
            "fisher_bytes_to_read": sum(fisher.bytes_to_read for fisher in placed),
            "calibration_bytes_to_read": calibration.bytes_to_read if calibration else 0,
            "from_hub": asdict(travel) | {"total": travel.total} if travel else None,
            "bytes_to_write": sum(shard.size for shard in self.shards),
            "shards": len(self.shards),
            "workers": self.budget.workers,
            "peak_host_bytes": max([merges, *passes_host]),
            "peak_merge_bytes": merges,
            "transfers": self._transfers(travel),
            "fisher_placement": asdict(max(placed, key=lambda fisher: fisher.host_bytes)) if placed else None,
            "fisher": self._fisher_source(),
            "calibration": asdict(calibration) if calibration else None,
            "notes": self.notes,
        }

    def _transfers(self, travel: Travel | None) -> dict[str, Any] | None:
        """How whole files travel to and from the Hub beside the merge; None where none do."""
        downloads = bool(travel and travel.downloads)
        if not (self.uploads or downloads):
            return None
        needed = ram_for_xet(uploads=self.uploads, downloads=downloads)
        return {"by": "xet" if self.xet_bytes else "http", "xet_bytes": self.xet_bytes, "ram_for_xet": needed}

    def _fisher_source(self) -> str:
        if not self.method.needs_fisher:
            return "none"
        measured = f"measured on {self.recipe.fisher.probes}"
        if self.method.fisher_of_experts:
            measured += ", of every model"
        return ", ".join(self.recipe.fisher_from) or measured

    def _calibration_cost(self) -> CalibrationCost | None:
        if not self.method.calibration:
            return None
        return calibration_cost(self.models, self.recipe.calibration, self.method.calibration)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan(
    recipe: RecipeLike,
    *,
    max_ram: int | str = DEFAULT_MAX_RAM,
    threads: int | None = None,
    hub_mode: HubMode = "cache",
    uploads: bool = False,
    progress: bool = False,
) -> MergePlan:
    """Open every input's headers, check them against one another and lay out the output.

    Args:
        recipe: what to merge; a mapping is read as one, and a path as that of a YAML file.
        max_ram: bytes for buffers and temporaries, on top of what importing torch takes; or a size such as "256MiB".
        threads: workers; the processors by default, at most 8; see `merge`.
        hub_mode: how models on the Hub will be read; see `merge`. Planning fetches headers, index and config only.
        uploads: whether the result will be pushed while it is merged.
        progress: show the progress of later downloads on standard error.

    Raises:
        RecipeError, CheckpointError, IncompatibleCheckpointsError, MemoryBudgetError: see there.
    """
    recipe = make_recipe(recipe)
    max_ram = parse_size(max_ram) if isinstance(max_ram, str) else max_ram
    with ExitStack() as stack:
        base = stack.enter_context(open_model(recipe.base, hub_mode, progress))
        refuse_quantised(base)
        resolved = resolve_method(recipe, sum(info.numel for info in base.tensors.values()))
        experts = [stack.enter_context(open_model(spec.model, hub_mode, progress)) for spec in recipe.models]
        for expert in experts:
            refuse_quantised(expert)
        matches = match_experts(base, experts)
        method = resolved.method
        _refuse_useless_fisher(recipe, method)
        check_texts(recipe.calibration, method.calibration, 1 + len(experts), recipe.named_method)
        prefix = decoder_prefix(base.tensors)
        shards = plan_shards(
            ((name, info.dtype, info.shape) for name, info in base.tensors.items()), recipe.max_shard_bytes
        )
        contexts = [
            TensorContext(info.name, info.shape, info.dtype, block_index(info.name, prefix))
            for shard in shards
            for info in shard.tensors
        ]
        actions = {tensor.name: action_on(tensor, method, base, matches) for tensor in contexts}
        fishers = []
        if recipe.fisher_from:
            needed = with_fisher(contexts, actions, method)
            for folder, model in zip(recipe.fisher_from, [base, *experts], strict=False):
                fishers.append(open_fisher(Path(folder), model, recipe.fisher, needed))
                stack.enter_context(fishers[-1][0])
        notes = [*(note for match in matches for note in match.notes), *tokenizer_notes(base, experts)]
        notes += same_model_notes(base, experts)
        code = [name for name in base.side_files() if name.endswith(".py")]  # refuses what must not be copied
        if code:
            notes.append(f"copied, never run: {', '.join(code)}: code that model {base.id} brings")
        units = units_of(contexts, actions, method)
        unbounded = Budget(1, 0, 0)
        job = MergePlan(recipe, base, experts, matches, fishers, resolved, actions, units, shards, unbounded, notes)
        merged = [(unit, tensor) for unit in units for tensor in unit.tensors if actions[tensor.name] == "merge"]
        held = {tensor.name: _held(method, unit, tensor) for unit, tensor in merged}
        job.uploads = uploads
        job.xet_bytes = xet_share(max_ram, uploads=uploads, downloads=any(model.missing_bytes for model in job.models))
        inputs = {tensor.name: job.inputs(tensor) for tensor in contexts}
        most = MOST_KEPT if all(model.is_local for model in job.checkpoints) else None
        try:
            job.budget = make_budget(max_ram - job.xet_bytes, threads, units, inputs, held, most)
        except MemoryBudgetError:
            job.xet_bytes = 0
            job.budget = make_budget(max_ram, threads, units, inputs, held, most)
        job._open = stack.pop_all()
        return job


def _held(method: Method, unit: Unit, tensor: TensorContext) -> int:
    """Bytes besides the temporaries of a tile."""
    return method.workspace(tensor) + max((step.workspace(unit) for step in method.passes(unit)), default=0)


def _refuse_useless_fisher(recipe: Recipe, method: Method) -> None:
    given = len(recipe.fisher_from)
    if not method.needs_fisher and (given or recipe.fisher != FisherSettings.model_validate({})):
        raise RecipeError(f"method {recipe.method} with these parameters uses no Fisher: leave out the Fisher options")
    wanted = 1 + len(recipe.models) if method.fisher_of_experts else 1
    if given not in (0, wanted):
        raise RecipeError(
            f"method {recipe.method} with these models takes {wanted} Fisher(s), {given} given: --fisher once for the "
            + ("base and once for each fine-tuned model, in order" if method.fisher_of_experts else "base model")
        )
