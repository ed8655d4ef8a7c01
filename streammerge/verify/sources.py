"""Merge tensors of a finished merge again, from its sources, and compare instead of writing."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from streammerge._version import __version__
from streammerge.checkpoints.checkpoint import Checkpoint, torch_dtype
from streammerge.engine import Engine
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError, RecipeError
from streammerge.fisher.store import check_same_base
from streammerge.methods.api import Method, Unit
from streammerge.plan import MergePlan, plan
from streammerge.recipe import Recipe, make_recipe
from streammerge.report import at_commit
from streammerge.verify.manifest import Manifest
from streammerge.verify.settings import SourceCheck


def rederive(folder: Path, manifest: Manifest, check: SourceCheck, progress: bool) -> dict[str, Any]:
    """Merge some tensors again and compare them, bit for bit, with those in the folder.

    Coefficients that come from the whole model (a survey, a Fisher, a text) are taken from the manifest, so that a
    sample costs no more than itself; with a sample of all they are derived too where everything for that is at hand.

    Returns:
        {"tensors": names, "differing": [{"tensor", "elements", "first": index, "found", "expected"}],
        "coefficients": "derived" or "recorded" in the manifest, "notes", "problems"}.

    Raises:
        RecipeError: what the merge measured is not at hand; what to give.
        CheckpointError: the manifest's recipe is none; a source is not what it was.
    """
    values = manifest.values
    recipe = _recipe(folder, values, check)
    with (
        plan(recipe, max_ram=check.max_ram, threads=check.threads, hub_mode=check.hub_mode, progress=progress) as job,
        Checkpoint.open(folder) as output,
    ):
        _require_same_sources(job, values)
        method = _known_method(job, values, everything=check.sample == "all")
        units = _sampled(job.units, check)
        _require_measured(job, method, units)
        sampled = [tensor.name for unit in units for tensor in unit.tensors]
        comparer = Comparer(output, sampled, values["tensors"])
        Engine(job, comparer, progress, label="Merge again", prepared=method).run()
    version = values.get("version")
    told = f"the merge is by version {version}, this is {__version__}: results may differ between versions"
    return {
        "tensors": sampled,
        "differing": [comparer.differing[name].as_dict(name) for name in sampled if name in comparer.differing],
        "coefficients": "derived" if method is None else "recorded",
        "notes": [told] if version != __version__ else [],
        "problems": [comparer.differing[name].text(name) for name in sampled if name in comparer.differing],
    }


@dataclass(frozen=True)
class Difference:
    """Where a tensor is not what its sources give."""

    shape: Sequence[int]
    elements: int
    first: int
    found: float
    expected: float

    @property
    def index(self) -> list[int]:
        """The first element that differs."""
        places = [int(place) for place in torch.unravel_index(torch.tensor(self.first), self.shape or (1,))]
        return places if self.shape else []

    def as_dict(self, name: str) -> dict[str, Any]:
        found, expected = (value if math.isfinite(value) else str(value) for value in (self.found, self.expected))
        return {"tensor": name, "elements": self.elements, "first": self.index, "found": found, "expected": expected}

    def text(self, name: str) -> str:
        return (
            f"tensor {name!r} is not what its sources give: {self.elements} elements differ, the first at "
            f"{self.index}, {self.found} instead of {self.expected}"
        )


class Comparer:
    """Takes the place of a writer that has everything but the sampled tensors: compares these instead of writing.

    Args:
        output: the merge.
        sampled: names of the tensors to compare.
        entries: what the manifest says of all tensors.

    Attributes:
        differing: where the tensors that differ do, by name.
    """

    def __init__(self, output: Checkpoint, sampled: Iterable[str], entries: Mapping[str, Any]) -> None:
        self.entries = entries
        self.differing: dict[str, Difference] = {}
        self._output, self._left = output, set(sampled)
        self._lock = Lock()

    def is_complete(self, name: str) -> bool:
        return name not in self._left

    def open(self, names: Iterable[str]) -> None: ...

    def write(self, name: str, start: int, data: memoryview) -> Difference | None:
        """Compare bytes of a tensor, from byte `start` of the tensor on."""
        info = self._output.info(name)
        found = bytearray(len(data))
        self._output.read_into(info, start, memoryview(found))
        if found == data:
            return None
        dtype, width = torch_dtype(info.dtype), info.nbytes // info.numel
        bits = [torch.frombuffer(raw, dtype=torch.uint8).view(-1, width) for raw in (found, bytearray(data))]
        places = (bits[0] != bits[1]).any(1).nonzero().flatten()
        at = int(places[0])
        values = [float(raw[at].view(dtype).double()) for raw in bits]
        return Difference(info.shape, len(places), start // width + at, *values)

    def complete(self, name: str, entry: Mapping[str, Any], written: Sequence[Difference | None]) -> None:
        """All of the tensor was compared; `written` is what every `write` returned."""
        found = [difference for difference in written if difference is not None]
        with self._lock:
            if found:
                first = min(found, key=lambda difference: difference.first)
                self.differing[name] = replace(first, elements=sum(difference.elements for difference in found))
            self._left.discard(name)

    def wait(self) -> None: ...


def _recipe(folder: Path, values: Mapping[str, Any], check: SourceCheck) -> Recipe:
    """The recipe of the manifest, models on the Hub at their commits, and what is given anew in its place."""
    try:
        recipe = make_recipe(values["recipe"])
        base, *experts = [source for source in values["sources"] if source["role"] != "fisher"]
        pinned = [at_commit(spec.model, source) for spec, source in zip(recipe.models, experts, strict=True)]
    except (RecipeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the recipe in its manifest is none: {error}") from None
    if check.models and len(check.models) != len(pinned):
        raise RecipeError(
            f"{len(check.models)} fine-tuned model(s) given, the merge has {len(pinned)}: give all, or none"
        )
    specs = [
        spec.model_copy(update={"model": model})
        for spec, model in zip(recipe.models, check.models or pinned, strict=True)
    ]
    if not check.base:
        _require_folder(recipe.base, base, "--base")
    for spec, source in zip(recipe.models, [] if check.models else experts, strict=False):
        _require_folder(spec.model, source, "--ft")
    recorded = recipe.fisher_from if all(os.path.isdir(path) for path in recipe.fisher_from) else []
    return recipe.model_copy(
        update={
            "base": check.base or at_commit(recipe.base, base),
            "models": specs,
            "fisher_from": check.fisher or recorded,
        }
    )


def _require_folder(reference: str, source: Mapping[str, Any], option: str) -> None:
    """Refuse a model that was a folder, and is one no more: its name may look like one on the Hub."""
    if source.get("revision") is None and not os.path.isdir(reference):
        raise RecipeError(f"{reference}: there is no such folder any more: say where the model is now with {option}")


def _require_same_sources(job: MergePlan, values: Mapping[str, Any]) -> None:
    """Refuse models, or a Fisher, that are not those the manifest names."""
    recorded = [source for source in values["sources"] if source["role"] != "fisher"]
    fishers = [source for source in values["sources"] if source["role"] == "fisher"]
    pairs = [*zip(job.models, recorded, strict=True)]
    if job.fishers and fishers:
        pairs += zip([fisher for fisher, _ in job.fishers], fishers, strict=True)
    different = [
        f"{source['role']}: {model.id} is not what {source['id']} was: another fingerprint"
        for model, source in pairs
        if model.fingerprint() != source["fingerprint"]
    ]
    for model, (_, record) in zip(job.of_fishers, job.fishers, strict=False):  # or none
        check_same_base(record, model, model.fingerprint())
    if job.fishers and not fishers:
        different += _other_means(job, values)
    if different:
        raise IncompatibleCheckpointsError("these are not the sources of the merge:", different)


def _other_means(job: MergePlan, values: Mapping[str, Any]) -> list[str]:
    """A Fisher that was measured for the merge is known by its block means alone."""
    fisher, record = job.fishers[0]
    means = {row["block"]: row.get("fisher_mean") for row in values["blocks"] if "tensor" not in row}
    for block in record.blocks:
        then = means.get(block.block)
        if then is not None and not math.isclose(block.mean, then, rel_tol=1e-9):
            return [
                f"fisher: {fisher.id} is not the one of the merge: the mean of block {block.block} is {block.mean}, "
                f"then it was {then} (another processor rounds differently)"
            ]
    return []


def _known_method(job: MergePlan, values: Mapping[str, Any], everything: bool) -> Method | None:
    """The method with the coefficients of the manifest; None where they are derived, or there are none to measure."""
    method = job.method
    measured = bool(method.calibration) or (method.needs_fisher and not job.fishers)
    if not measured and (everything or not job.surveyed):
        return None
    found = {name: entry.get("coefficient") for name, entry in values["tensors"].items()}
    recorded = {
        name: value if isinstance(value, list) else [value] for name, value in found.items() if value is not None
    }
    known = method.recalled(recorded, job.surveyed)
    if known is None and method.calibration:
        raise RecipeError(
            f"{job.recipe.named_method} measures activations that no manifest keeps, so its tensors cannot be derived "
            "from the sources alone: merge again into another folder and compare the two"
        )
    return known


def _require_measured(job: MergePlan, method: Method | None, units: Sequence[Unit]) -> None:
    """Refuse a method that reads a Fisher where there is none."""
    if job.fishers or not job.method.needs_fisher:
        return
    reading = [tensor.name for unit in units for tensor in unit.tensors if job.reads_fisher(tensor)]
    if reading or method is None:
        raise RecipeError(
            f"{job.recipe.named_method} reads the Fisher that was measured for the merge"
            + (f" ({reading[0]!r} for one is trimmed by it)" if reading else "")
            + ": give its folder with --fisher; it is what --save-fisher kept, or what `streammerge fisher` measures "
            "again with the same settings on the same kind of processor"
        )


def _sampled(units: Sequence[Unit], check: SourceCheck) -> list[Unit]:
    """Units drawn at random until they have as many tensors as wanted, in output order."""
    if check.sample == "all":
        return list(units)
    chosen: set[str] = set()
    left = check.sample
    for unit in random.Random(check.seed).sample(list(units), len(units)):
        if left <= 0:
            break
        chosen.add(unit.key)
        left -= len(unit.tensors)
    return [unit for unit in units if unit.key in chosen]
