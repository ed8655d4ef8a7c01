"""Which files of a model hold its weights, and the index that says so."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping

from streammerge.checkpoints.files import Files
from streammerge.checkpoints.header import TensorInfo
from streammerge.checkpoints.header_text import bad_tensor_name
from streammerge.errors import CheckpointError, HeaderError
from streammerge.names import unsafe_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FRAME_BYTES, _ENTRY_BYTES = 56, 84  # of a header, and of its entry for one tensor, besides the name
_PART = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")  # one of several: alone it is not a model


def find_weights(files: Files) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files to read and, where there is an index, its weight map.

    Raises:
        CheckpointError: there are none, only some of several, or only pickled ones.
        HeaderError: a malformed index, one that names what is missing, or one beside a single file of other weights.
    """
    id, top = files.id, files.top()
    if INDEX_FILE in top:
        weight_map = _read_weight_map(files)
        names = sorted(set(weight_map.values()))
        if SINGLE_FILE in top and SINGLE_FILE not in names:
            raise HeaderError(f"model {id}: both {SINGLE_FILE} and an index of other files: delete the one left over")
        for name in names:
            if not files.has(name):
                raise HeaderError(f"model {id}, file {INDEX_FILE}: names {name}, which is missing")
        return names, weight_map
    if SINGLE_FILE in top:
        return [SINGLE_FILE], None
    found = [name for name in top if name.endswith(".safetensors")]
    if len(found) == 1 and not _PART.search(found[0]):
        return found, None
    if found:
        raise CheckpointError(
            f"model {id}: no {INDEX_FILE} beside {found[0]} ({len(found)} safetensors files): is a download incomplete?"
        )
    pickled = [name for name in top if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise CheckpointError(
            f"model {id}: only pickled weights ({pickled[0]}), which streammerge never loads; convert them with "
            f"transformers: AutoModelForCausalLM.from_pretrained({_quoted(files)}, dtype='auto')"
            ".save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"model {id}: no safetensors file in {files.folder or 'the repository'}")


def guess_headers(names: Iterable[str], weight_map: Mapping[str, str] | None) -> dict[str, int]:
    """About how many bytes of each file are its header, from the names of the tensors in it; 0: not known."""
    guesses = dict.fromkeys(names, _FRAME_BYTES if weight_map else 0)
    for tensor, file in (weight_map or {}).items():
        guesses[file] += len(tensor.encode()) + _ENTRY_BYTES
    return guesses


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], id: str) -> None:
    """Raise HeaderError where an index and the headers of its files disagree."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise HeaderError(f"model {id}, file {INDEX_FILE}: maps tensor {name!r} to {file}, which does not hold it")
    for name, info in tensors.items():
        if name not in weight_map:
            raise HeaderError(
                f"model {id}, file {info.file}: holds tensor {name!r}, which {INDEX_FILE} does not name: "
                "are files of two checkpoints mixed?"
            )


def _read_weight_map(files: Files) -> dict[str, str]:
    where = files.where(INDEX_FILE)
    weight_map = files.json(INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{where}: it has no weight_map")
    for name, file in weight_map.items():
        if reason := bad_tensor_name(name):
            raise HeaderError(f"{where}: tensor {name[:99]!r}: {reason}")
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise HeaderError(
                f"{where}: tensor {name!r} is mapped to {reprlib.repr(file)}, which is no safetensors file"
            )
    for file in dict.fromkeys(weight_map.values()):
        if reason := unsafe_name(file):
            name = next(name for name in weight_map if weight_map[name] == file)
            raise HeaderError(f"{where}: tensor {name!r} is mapped to {file[:200]!r}, no file of the folder: {reason}")
    return weight_map


def _quoted(files: Files) -> str:
    return "FOLDER" if files.folder else repr(files.id)
