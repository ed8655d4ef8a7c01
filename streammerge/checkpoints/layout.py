"""The layout of a checkpoint to be written: which tensor lies where in which shard, from headers alone."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streammerge.checkpoints.header import DTYPES, TensorInfo, encode_header, tensor_nbytes
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its header bytes, its tensors with absolute offsets, its size."""

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    size: int


def plan_shards(tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Cut (name, dtype, shape) triples, in order, into shards of at most `max_shard_bytes` tensor bytes each.

    A tensor larger than that gets a shard of its own. Within a shard wider dtypes come first, so that every
    tensor is aligned to its element size, as the format's own writer does.
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = tensor_nbytes(dtype, shape)
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(TensorInfo(name, dtype, tuple(shape), "", 0, nbytes))
        filled += nbytes
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return tuple(_lay_out(file, group) for file, group in zip(names, groups, strict=True))


def _lay_out(file: str, tensors: list[TensorInfo]) -> Shard:
    ordered = sorted(tensors, key=lambda info: -DTYPES[info.dtype].bits)
    placed, position = [], 0
    for info in ordered:
        placed.append(TensorInfo(info.name, info.dtype, info.shape, file, position, position + info.nbytes))
        position += info.nbytes
    header = encode_header(placed)
    shift = len(header)
    absolute = tuple(TensorInfo(t.name, t.dtype, t.shape, file, t.start + shift, t.stop + shift) for t in placed)
    return Shard(file, header, absolute, shift + position)


def file_names(shards: Sequence[Shard]) -> list[str]:
    """The weight files of a checkpoint of these shards, the index included where there is one."""
    return [*(shard.file for shard in shards), *([INDEX_FILE] if len(shards) > 1 else [])]


def index_files(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index with its content, which says what tensor lies in which shard; none for a single one."""
    if len(shards) == 1:
        return {}
    weight_map = {info.name: shard.file for shard in shards for info in shard.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_FILE: json.dumps(value, indent=2).encode() + b"\n"}
