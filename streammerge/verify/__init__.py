"""Check a finished merge: against its manifest, every byte, header and value; and against its sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import StreammergeError
from streammerge.heap import large_imports
from streammerge.schema import build
from streammerge.verify.files import check_hashes, check_headers, nonfinite_tensors
from streammerge.verify.manifest import read_manifest
from streammerge.verify.settings import SourceCheck


def verify(
    folder: str | Path, *, sources: SourceCheck | Mapping[str, Any] | None = None, progress: bool = False
) -> dict[str, Any]:
    """Hold every byte, header, name, shape, dtype and value of a merge against its manifest. Changes nothing.

    The manifest has the SHA-256 of every file, and of its own bytes; so no flipped bit in any of them is missed.

    Args:
        folder: an output folder of `merge`.
        sources: then also merge some tensors, or all, from the inputs again and compare bit for bit; a mapping is read
            as `SourceCheck`, {} takes 16 tensors.
        progress: show progress bars on standard error.

    Returns:
        {"ok", "problems": one line each, "tensors", "bytes", "nonfinite": tensors that hold NaN or Inf, "notes"};
        with `sources` also "sources": {"tensors": names, "differing": [{"tensor", "elements", "first": index, "found",
        "expected"}], "coefficients": "derived" or "recorded" in the manifest, "notes"}, where nothing else is wrong.

    Raises:
        CheckpointError: there is no manifest to compare with; a source is another one than was merged.
        RecipeError: the sources do not tell the tensors, with what is missing.
    """
    if sources is not None and not isinstance(sources, SourceCheck):
        sources = build(SourceCheck, sources, "sources")
    folder = Path(folder)
    manifest = read_manifest(folder)
    notes = [] if manifest.is_sealed else [_UNSEALED]
    problems = manifest.problems()
    problems += [f"file {name} is missing" for name in manifest.files if not (folder / name).is_file()]
    problems += check_hashes(folder, {**(manifest.other_files or {}), **manifest.shards}, progress)
    nonfinite: list[str] = []
    count = total = 0
    derived: dict[str, Any] = {}
    try:
        with Checkpoint.open(folder) as checkpoint:
            problems += check_headers(checkpoint, manifest)
            nonfinite = nonfinite_tensors(checkpoint, progress)
            count, total = len(checkpoint.tensors), sum(info.nbytes for info in checkpoint.tensors.values())
    except StreammergeError as error:
        problems.append(str(error))
    if not manifest.recipe.allow_nonfinite:
        problems += [f"tensor {name!r} holds NaN or Inf" for name in nonfinite]
    if sources is not None and not problems:
        with large_imports():
            from streammerge.verify.sources import rederive  # imports torch

        derived["sources"] = rederive(folder, manifest, sources, progress)
        problems += derived["sources"].pop("problems")
    return {
        "ok": not problems,
        "problems": problems,
        "tensors": count,
        "bytes": total,
        "nonfinite": nonfinite,
        "notes": notes,
        **derived,
    }


_UNSEALED = "the manifest is from before it said what other files and itself should be: only the shards are checked"
