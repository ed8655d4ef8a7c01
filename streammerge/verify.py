"""Check a finished merge against its manifest: every byte, header, name, shape, dtype and value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint, torch_dtype
from streammerge.checkpoints.json_text import parse_object
from streammerge.errors import CheckpointError, HeaderError, StreammergeError
from streammerge.progress import progress_bar
from streammerge.schema import FileName

_PIECE = 16 << 20


def verify(folder: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Re-hash every shard, load every header, and compare names, shapes, dtypes and values with the manifest.

    Args:
        folder: an output folder of `merge`.
        progress: show a progress bar on standard error.

    Returns:
        {"ok", "problems": one line each, "tensors", "bytes", "nonfinite": tensors that hold NaN or Inf}.

    Raises:
        CheckpointError: there is no manifest to compare with.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = [f"file {name} is missing" for name in manifest.files if not (folder / name).is_file()]
    problems += _check_hashes(folder, manifest.shards, progress)
    nonfinite: list[str] = []
    count = total = 0
    try:
        with Checkpoint.open(folder) as checkpoint:
            problems += _check_headers(checkpoint, manifest)
            nonfinite = _nonfinite(checkpoint, progress)
            count, total = len(checkpoint.tensors), sum(info.nbytes for info in checkpoint.tensors.values())
    except StreammergeError as error:
        problems.append(str(error))
    if not manifest.recipe.allow_nonfinite:
        problems += [f"tensor {name!r} holds NaN or Inf" for name in nonfinite]
    return {"ok": not problems, "problems": problems, "tensors": count, "bytes": total, "nonfinite": nonfinite}


class _Part(BaseModel):
    """Part of a manifest, as far as it is compared; the rest is what happened, which no later look can tell."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Tensor(_Part):
    dtype: str
    shape: list[int]


class _Shard(_Part):
    bytes: int
    sha256: str


class _Recipe(_Part):
    allow_nonfinite: bool
    method: str


class Manifest(_Part):
    recipe: _Recipe
    tensors: dict[str, _Tensor] = Field(min_length=1)
    shards: dict[FileName, _Shard] = Field(min_length=1)
    files: list[FileName]


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name the system cannot hold
        raise CheckpointError(f"{folder}: there is no {MANIFEST_FILE}, so this is no finished merge of streammerge")
    try:
        return Manifest.model_validate(parse_object(path.read_bytes(), str(path)))
    except (ValueError, HeaderError):
        raise CheckpointError(f"{folder}, file {MANIFEST_FILE}: damaged: not a manifest of streammerge") from None


def _check_hashes(folder: Path, shards: Mapping[str, _Shard], progress: bool) -> list[str]:
    problems = []
    total = sum(entry.bytes for entry in shards.values())
    with progress_bar(total, "Hash", "B", progress) as bar:
        for file, entry in shards.items():
            path = folder / file
            if not path.is_file():
                continue  # reported among the files
            if path.stat().st_size != entry.bytes:
                problems.append(f"file {file} has {path.stat().st_size} bytes, the manifest says {entry.bytes}")
                continue
            digest = hashlib.sha256()
            try:
                with path.open("rb") as source:
                    while piece := source.read(_PIECE):
                        digest.update(piece)
                        bar.update(len(piece))
            except OSError as error:
                problems.append(f"file {file} cannot be read: {error.strerror}")
                continue
            if digest.hexdigest() != entry.sha256:
                problems.append(f"file {file} differs from the SHA-256 in the manifest")
    return problems


def _check_headers(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    files = {info.file for info in checkpoint.tensors.values()}
    problems = [f"file {file} is not among the manifest's shards" for file in sorted(files - manifest.shards.keys())]
    for name in sorted({*manifest.tensors, *checkpoint.tensors}):
        info, entry = checkpoint.tensors.get(name), manifest.tensors.get(name)
        if info is None:
            problems.append(f"tensor {name!r} is missing")
        elif entry is None:
            problems.append(f"tensor {name!r} is not in the manifest")
        elif (info.dtype, list(info.shape)) != (entry.dtype, entry.shape):
            found, wanted = f"{info.dtype} {list(info.shape)}", f"{entry.dtype} {entry.shape}"
            problems.append(f"tensor {name!r} is {found}, the manifest says {wanted}")
    return problems


def _nonfinite(checkpoint: Checkpoint, progress: bool) -> list[str]:
    """The floating tensors that hold NaN or Inf, read piece by piece."""
    import torch

    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    found = []
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with progress_bar(total, "Values", "B", progress) as bar:
        for name, info in checkpoint.tensors.items():
            for start in range(0, info.nbytes if info.floating else 0, _PIECE):
                raw = buffer[: min(_PIECE, info.nbytes - start)]
                checkpoint.read_into(info, start, as_bytes(raw))
                values = raw.view(torch_dtype(info.dtype))
                values = values.float() if values.element_size() == 1 else values
                if not values.sum().isfinite() and not values.isfinite().all():
                    found.append(name)
                    break
            bar.update(info.nbytes)
    return found
