"""What lies in an output folder, against its manifest: bytes, headers, values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, count_nonfinite, torch_dtype
from streammerge.progress import progress_bar
from streammerge.verify.manifest import FileEntry, Manifest

_PIECE = 16 << 20


def check_hashes(folder: Path, files: Mapping[str, FileEntry], progress: bool) -> list[str]:
    """Sizes and SHA-256 of the files that are there."""
    problems = []
    total = sum(entry.bytes for entry in files.values())
    with progress_bar(total, "Hash", "B", progress) as bar:
        for file, entry in files.items():
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


def check_headers(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """Names, dtypes and shapes of the tensors."""
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


def nonfinite_tensors(checkpoint: Checkpoint, progress: bool) -> list[str]:
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
                if count_nonfinite(raw.view(torch_dtype(info.dtype))):
                    found.append(name)
                    break
            bar.update(info.nbytes)
    return found
