"""The fingerprint of a model: a SHA-256 over a few bytes of every tensor, whichever files they lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.source import Part, Source

_SAMPLE_BYTES = 64  # at each of three places of a tensor


def fingerprint(tensors: Mapping[str, TensorInfo], sources: Mapping[str, Source]) -> str:
    """The fingerprint of tensors whose files are open, see `Checkpoint.fingerprint`."""
    samples = {name: bytearray(3 * _sample_size(info)) for name, info in tensors.items()}
    by_file: dict[str, list[Part]] = {}
    for name, info in tensors.items():
        view, size = memoryview(samples[name]), _sample_size(info)
        for place, offset in enumerate(_sample_places(info)):
            by_file.setdefault(info.file, []).append((offset, view[place * size : (place + 1) * size]))
    for file, parts in by_file.items():
        sources[file].sample(parts)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, info.dtype, info.shape]).encode())
        digest.update(samples[name])
    return digest.hexdigest()


def fingerprint_bytes(tensors: Mapping[str, TensorInfo], sources: Mapping[str, Source]) -> int:
    """How many bytes travel for the fingerprint."""
    by_file: dict[str, list[tuple[int, int]]] = {}
    for info in tensors.values():
        by_file.setdefault(info.file, []).extend((at, _sample_size(info)) for at in _sample_places(info))
    return sum(sources[file].sample_bytes(parts) for file, parts in by_file.items())


def _sample_size(info: TensorInfo) -> int:
    return min(_SAMPLE_BYTES, info.nbytes)


def _sample_places(info: TensorInfo) -> tuple[int, int, int]:
    """Where in the file the samples begin: at the tensor's start, middle and end."""
    size = _sample_size(info)
    return info.start, info.start + (info.nbytes - size) // 2, info.stop - size
