"""Which tensors of a checkpoint make up which parameters of the transformers model.

Mostly one tensor is one parameter of the same name. Since transformers 5 some families are computed in another
form than they are stored: the experts of a mixture, for example, are many tensors on disk and one parameter in
memory. All use of transformers' conversion internals is here. Tested with transformers 5.17 to 5.23
(tests/fisher/test_names.py fails where they move).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError


@dataclass(frozen=True)
class Part:
    """One tensor's place in a parameter.

    Attributes:
        tensor: the checkpoint's entry.
        start: index of the tensor's first element in the flattened parameter; the others follow in order.
    """

    tensor: TensorInfo
    start: int


def parameter_parts(model: transformers.PreTrainedModel, base: Checkpoint) -> dict[str, tuple[Part, ...]]:
    """Parameter name -> the tensors it is made of, in order; a tied parameter appears once, under its first name.

    Raises:
        CheckpointError: the model computes with a form of its tensors that is no plain stacking of them.
        IncompatibleCheckpointsError: every parameter whose tensors are missing or have another size.
    """
    renamed, fused = _targets(model, base)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    parts: dict[str, tuple[Part, ...]] = {}
    mismatches: list[str] = []
    for names in aliases.values():
        shape = tuple(model.get_parameter(names[0]).shape)
        stored = next((name for name in names if name in renamed or name in fused), None)
        if stored is None:
            mismatches.append(f"there is no tensor {names[0]!r} {list(shape)}")
        elif stored in fused:
            parts[names[0]] = found = _stacked(*fused[stored], base)
            count, needed = sum(part.tensor.numel for part in found), model.get_parameter(names[0]).numel()
            odd = next((part.tensor for part in found if part.tensor.shape[-1:] != shape[-1:]), None)
            if odd is not None:
                mismatches.append(f"tensor {odd.name!r} is {list(odd.shape)}, as a part of {stored!r} {list(shape)}")
            elif count != needed:
                mismatches.append(f"the {len(found)} tensors of {stored!r} have {count} elements, it needs {needed}")
            elif len({part.tensor.dtype for part in found}) > 1:
                mismatches.append(f"the {len(found)} tensors of {stored!r} are not all of one dtype")
        elif renamed[stored].shape != shape:
            info = renamed[stored]
            mismatches.append(f"tensor {info.name!r} is {list(info.shape)}, the model needs {list(shape)}")
        else:
            parts[names[0]] = (Part(renamed[stored], 0),)
    if mismatches:
        raise IncompatibleCheckpointsError(
            f"model {base.id}: its files do not fit {type(model).__name__} of transformers {transformers.__version__}:",
            mismatches,
        )
    return parts


def _targets(
    model: transformers.PreTrainedModel, base: Checkpoint
) -> tuple[dict[str, TensorInfo], dict[str, tuple[WeightConverter, dict[str, list[str]]]]]:
    """What each tensor becomes: a parameter by itself, or part of one (with the converter, by source pattern)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    renamed: dict[str, TensorInfo] = {}
    fused: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for name, info in base.tensors.items():
        target, pattern = (
            (name, None)
            if name in state
            else rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        )
        if pattern is None:
            renamed[target] = info
        else:
            fused.setdefault(target, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)
    return renamed, fused


def _stacked(converter: WeightConverter, sources: Mapping[str, list[str]], base: Checkpoint) -> tuple[Part, ...]:
    """Where the tensors of a stacked parameter lie in it: expert by expert, in each the patterns in order."""
    groups = [sorted(sources.get(pattern, ()), key=dot_natural_key) for pattern in converter.source_patterns]
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    stacks = kinds[:1] == [(MergeModulelist, 0)] and (kinds[1:] == [] or kinds[1:] == [(Concatenate, 1)])
    if not stacks and not (kinds == [(Concatenate, 0)] and all(len(group) == 1 for group in groups)):
        names = ", ".join(type(operation).__name__ for operation in converter.operations)
        first = next(name for group in groups for name in group)
        raise CheckpointError(
            f"model {base.id}: transformers {transformers.__version__} reshapes tensor {first!r} and its like when it "
            f"loads them ({names}), so their Fisher cannot be measured under the names of the files"
        )
    if len({len(group) for group in groups}) != 1:
        counts = ", ".join(
            f"{len(group)} {pattern}" for group, pattern in zip(groups, converter.source_patterns, strict=True)
        )
        raise CheckpointError(f"model {base.id}: tensors of some experts are missing: there are {counts}")
    parts, position = [], 0
    for of_expert in zip(*groups, strict=True):
        for name in of_expert:
            parts.append(Part(base.info(name), position))
            position += base.info(name).numel
    return tuple(parts)


def is_linear_weight(model: nn.Module, parameter: str) -> bool:
    """Whether the parameter is the weight of a plain linear layer, which works in the dtype of the file."""
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
