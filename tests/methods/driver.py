"""Runs a merge method over in-memory tensors, tile by tile, as the engine does from files; and models to run it on.

The method sees tiles of `TensorContext.tile_rows` rows: set `streammerge.methods.api.TILE_ELEMENTS` to cut them anew.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from streammerge.calibration.store import Calibrated, CalibrationRecord, CalibrationSettings, Sensitivity, entry
from streammerge.fisher.store import FisherRecord, TensorFisher
from streammerge.methods.api import Method, Pass, RowBlock, TensorContext, Unit
from streammerge.recipe import Resolved, make_recipe, resolve_method

Tensors = dict[str, Tensor]
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class Models:
    """A base model, its fine-tuned models, its diagonal Fisher and theirs, and what they did with a text."""

    base: Tensors
    experts: list[Tensors]
    fisher: Tensors
    fishers: list[Tensors] = field(default_factory=list)
    calibrated: Calibrated | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge gave. The tensors are as computed, not yet rounded to the base's dtype."""

    tensors: Tensors
    reports: dict[str, dict[str, Any]]
    blocks: list[dict[str, Any]]

    @property
    def alphas(self) -> list[float]:
        return [row["alpha"] for row in self.blocks]


def resolve(
    method: str, experts: int = 1, parameter_count: int = 1000, aim: float | None = None, **parameters: Any
) -> Resolved:
    """The method as a recipe with these parameters would make it; the models are called `ft0`, `ft1`, ..."""
    models = [f"ft{i}" for i in range(experts)]
    recipe = make_recipe({"base": "base", "models": models, "method": method, "parameters": parameters, "aim": aim})
    return resolve_method(recipe, parameter_count)


def merge(method: str, models: Models, parameter_count: int = 1000, **parameters: Any) -> Merged:
    """Survey, prepare, passes and apply, over every tensor of the base."""
    merger = resolve(method, len(models.experts), parameter_count, **parameters).method
    contexts = [context_of(name, tensor) for name, tensor in models.base.items()]
    surveys: dict[TensorContext, Any] = {}
    for context in contexts:
        if (survey := merger.survey(context)) is not None:
            unit, blocks = _unit([context], models, merger, survey.reads_fisher)
            surveys[context] = run_passes([survey], unit, blocks)[survey.name]
    records = [record_of(fisher) for fisher in _fishers(merger, models)]
    merger = merger.prepared(surveys, records, models.calibrated)

    groups: dict[str, list[TensorContext]] = {}
    for context in contexts:
        if merger.merges(context):
            groups.setdefault(merger.unit_of(context), []).append(context)
    found: Tensors = {}
    reports = {}
    for group in groups.values():
        unit, blocks = _unit(group, models, merger, merger.reads_fisher(group[0]))
        given = {"calibrated": {c.name: models.calibrated.of(c.name) for c in group}} if models.calibrated else {}
        results = run_passes(merger.passes(unit), unit, blocks, given)
        found |= _apply(merger, blocks, results)
        reports |= {context.name: merger.report(context, results) for context in group}
    tensors = {
        name: found[name].view(base.shape) if name in found else base.float() for name, base in models.base.items()
    }
    return Merged(tensors, reports, merger.block_table())


def run_passes(
    passes: Sequence[Pass],
    unit: Unit,
    blocks: Callable[[], Iterable[RowBlock]],
    given: Mapping[str, Any] | None = None,
    sample: Callable[[], Iterable[RowBlock]] | None = None,
) -> dict[str, Any]:
    """The results of the passes, by name, beside those that are given; the sample is every third block by default."""
    results: dict[str, Any] = dict(given or {})
    for step in passes:
        state = step.start(unit, results)
        if state is not None:
            for block in blocks() if step.reads_rows else ():
                step.update(state, block)
            for block in (sample() if sample else islice(blocks(), None, None, 3)) if step.samples else ():
                step.update(state, block)
            results[step.name] = step.finish(state)
    return results


def context_of(name: str, tensor: Tensor) -> TensorContext:
    found = _BLOCK.match(name)
    return TensorContext(name, tuple(tensor.shape), _DTYPES[tensor.dtype], int(found[1]) if found else None)


def record_of(fisher: Tensors) -> FisherRecord:
    """A Fisher's record with nothing but what a method looks at: the tensors' means."""
    tensors = {
        name: TensorFisher(
            block=context_of(name, values).block,
            numel=values.numel(),
            mean=values.double().mean().item(),
            max=values.max().item(),
        )
        for name, values in fisher.items()
    }
    return FisherRecord.model_construct(tensors=tensors)


def make_models(
    experts: int = 1,
    blocks: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, Sequence[int]] | None = None,
) -> Models:
    """A random decoder; the task vectors grow and the Fisher shrinks with the block's number.

    Args:
        extra: further tensors, name -> shape.
    """
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (5, 6)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        shapes |= {
            prefix + "input_layernorm.weight": (6,),
            prefix + "self_attn.q_proj.weight": (6, 6),
            prefix + "self_attn.q_proj.bias": (6,),
            prefix + "mlp.gate_proj.weight": (9, 6),
            prefix + "mlp.down_proj.weight": (6, 9),
        }
    shapes |= {"model.norm.weight": (6,), "lm_head.weight": (5, 6), **(extra or {})}
    generator = torch.Generator().manual_seed(7)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: draw(shape).to(dtype) for name, shape in shapes.items()}
    size = {name: context_of(name, tensor).block or 0 for name, tensor in base.items()}
    tuned = [
        {n: (b.float() + 0.2 * 1.5 ** size[n] * draw(b.shape)).to(dtype) for n, b in base.items()}
        for _ in range(experts)
    ]

    def draw_fisher() -> Tensors:
        return {name: (draw(shape).square() * 1e-3 * 0.1 ** size[name]).to(dtype) for name, shape in shapes.items()}

    fisher = draw_fisher()
    calibrated = make_calibrated(base, experts, blocks, draw)
    return Models(base, tuned, fisher, [draw_fisher() for _ in range(experts)], calibrated)


def make_calibrated(
    base: Tensors, experts: int, blocks: int, draw: Callable[[Sequence[int]], Tensor], tokens: int = 4
) -> Calibrated:
    """Numbers as a calibration gives them, of the models' shapes; the scalar and one matrix have none."""
    places = ["embedding", *map(str, range(blocks)), "norm", "head"]
    tensors: Tensors = {}
    for name, tensor in base.items():
        columns = tensor.shape[-1:]
        if tensor.dim() and "k_proj" not in name:
            tensors[entry("channels", 0, name)] = draw(columns).abs()
            if tensor.dim() > 1:
                for model in range(experts + 1):
                    tensors[entry("inputs", model, name)] = draw((tokens + model, *columns))
    record = CalibrationRecord(
        version="0",
        settings=CalibrationSettings(),
        device="cpu",
        mutual_information=[{place: draw((3,)).abs().double().tolist() for place in places} for _ in range(experts)],
        sensitivity=Sensitivity(
            blocks=[{block: draw(()).abs().item() for block in range(blocks)} for _ in range(experts + 1)],
            distances=(draw((experts + 1, experts + 1)).abs() * (1 - torch.eye(experts + 1))).tolist(),
        ),
        tensors=dict.fromkeys(tensors, "memory"),
    )
    return Calibrated(record, tensors.__getitem__)


def in_order(models: Models, order: Sequence[int]) -> Models:
    """The same models, the experts in another order."""
    assert models.calibrated is not None and models.calibrated.record.sensitivity is not None
    record, seats = models.calibrated.record, [0, *(1 + i for i in order)]
    sensitivity = models.calibrated.record.sensitivity
    moved = record.model_copy(
        update={
            "mutual_information": [(record.mutual_information or [])[i] for i in order],
            "sensitivity": Sensitivity(
                blocks=[sensitivity.blocks[seat] for seat in seats],
                distances=[[sensitivity.distances[a][b] for b in seats] for a in seats],
            ),
        }
    )

    def read(name: str) -> Tensor:
        measurement, model, tensor = name.split(".", 2)
        return models.calibrated.read(entry(measurement, seats[int(model)], tensor))

    experts, fishers = ([group[i] for i in order] for group in (models.experts, models.fishers))
    return Models(models.base, experts, models.fisher, fishers, Calibrated(moved, read))


def matrices_of(models: Models) -> list[str]:
    """The names of the decoder blocks' matrices."""
    contexts = [context_of(name, tensor) for name, tensor in models.base.items()]
    return [context.name for context in contexts if context.is_matrix and context.block is not None]


def _fishers(method: Method, models: Models) -> list[Tensors]:
    if not method.needs_fisher:
        return []
    return [models.fisher, *models.fishers] if method.fisher_of_experts else [models.fisher]


def _unit(
    contexts: Sequence[TensorContext], models: Models, method: Method, with_fisher: bool
) -> tuple[Unit, Callable[[], Iterator[RowBlock]]]:
    """A unit, and what walks its tiles anew at every call."""
    unit = Unit(contexts[0].name, tuple(contexts))

    def blocks() -> Iterator[RowBlock]:
        offset = 0
        for context in contexts:
            inputs = [model[context.name] for model in (models.base, *models.experts)]
            fishers = [fisher[context.name] for fisher in _fishers(method, models)] if with_fisher else []
            compute = torch.float64 if any(values.dtype == torch.float64 for values in inputs) else torch.float32
            rows = [values.view(context.rows, context.columns) for values in inputs]
            weights = [fisher.view(context.rows, context.columns) for fisher in fishers]
            for row in range(0, context.rows, context.tile_rows):
                part = slice(row, row + context.tile_rows)
                stored = [values[part] for values in rows]
                yield RowBlock(context, offset, row, stored, [w[part] for w in weights], compute)
            offset += context.numel

    return unit, blocks


def _apply(method: Method, blocks: Callable[[], Iterable[RowBlock]], results: Mapping[str, Any]) -> Tensors:
    rows: dict[str, list[Tensor]] = {}
    for block in blocks():
        merged = method.apply(block, results)
        assert merged.shape == block.base.shape and merged.dtype == block.base.dtype, block.tensor.name
        rows.setdefault(block.tensor.name, []).append(merged)
    return {name: torch.cat(parts) for name, parts in rows.items()}
