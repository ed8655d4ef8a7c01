"""Which files besides its weights a merged model takes over from its base, and which it must not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.checkpoints.files import Files
from streammerge.errors import CheckpointError
from streammerge.names import clash, folded, unsafe_name
from streammerge.units import format_size

MAX_SIDE_BYTES = 2**30  # of all together; a tokenizer takes 35 MB

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot"),
    *(".tflite", ".mlmodel", ".index.json"),
)
_WEIGHT_FOLDER = re.compile(r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?)/", re.IGNORECASE)


def find_side_files(files: Files, ours: Sequence[str]) -> list[str]:
    """Every non-weight file, to be copied verbatim and never run, as sorted relative names.

    Left out: weights and their indexes, hidden files, and what the output gets anew.

    Args:
        files: the model's files.
        ours: the names of what the output gets anew.

    Raises:
        CheckpointError: a name that would not stay in the folder, or is one with another where case and Unicode form
            do not count; a link to a file outside; more than `MAX_SIDE_BYTES` together.
    """
    anew = {folded(name) for name in ours}
    names = [name for name in files.names() if not _is_left_out(name, anew)]
    for name in names:
        if reason := unsafe_name(name):
            raise CheckpointError(f"{files.where(name)}: not copied into the output: {reason}; rename or remove it")
        if files.leads_out(name):
            raise CheckpointError(
                f"{files.where(name)}: a link to a file outside of the model, whose content would come into the "
                "output: put the file itself there, or remove the link"
            )
        if in_weights := _WEIGHT_FOLDER.match(name):
            raise CheckpointError(f"{files.where(name)}: {in_weights[1]} is a folder: rename or remove it")
    if pair := clash([*names, *ours]):
        raise CheckpointError(
            f"model {files.id}: files {pair[0]!r} and {pair[1]!r} are one and the same where case and Unicode form do "
            "not count: rename or remove one"
        )
    _check_sizes(files, {name: files.length(name) for name in names})
    return names


def _is_left_out(name: str, anew: set[str]) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return hidden or folded(name) in anew or name.lower().endswith(_WEIGHT_SUFFIXES)


def _check_sizes(files: Files, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_SIDE_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise CheckpointError(
            f"model {files.id}: {format_size(total)} of files besides its weights, {format_size(sizes[largest])} of it "
            f"in {largest!r}: more than the {format_size(MAX_SIDE_BYTES)} that are copied; give a folder without them"
        )
