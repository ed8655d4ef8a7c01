"""A checkpoint folder: its tensors by name, its config, its other files. Knows nothing of merging."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from streammerge.checkpoints.header import DTYPES, TensorInfo, header_length, parse_header, unique_keys
from streammerge.checkpoints.source import LocalFile, Source
from streammerge.errors import CheckpointError, HeaderError, MissingTensorError, TransferError

if TYPE_CHECKING:
    from torch import Tensor, dtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "streammerge.json"
CARD_FILE = "README.md"

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot"),
    *(".tflite", ".mlmodel", ".index.json"),
)
_MAX_CONFIG_BYTES = 100_000_000
_PART = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")  # one of several: alone it is not a model


def torch_dtype(name: str) -> dtype:
    """The torch dtype of a safetensors dtype name; raises CheckpointError where torch has none."""
    import torch

    found = getattr(torch, DTYPES[name].torch_name or "", None)
    if found is None:
        raise CheckpointError(f"torch {torch.__version__} has no dtype for {name}")
    return found  # type: ignore[no-any-return]


class Checkpoint:
    """Names, shapes, config and side files of a model folder; reads any byte range of any tensor.

    Opening reads headers, index and config only, and validates them. Use as a context manager, or call
    `close`. Safe to read from several threads.

    Attributes:
        folder: where the files lie.
        id: how the user named the model: a path, or a Hub repository id.
        revision: the commit on the Hub, or None.
        config: the parsed `config.json` ({} where the folder has none).
        tensors: TensorInfo by name, in the order of the files and of the bytes in them.
    """

    def __init__(
        self,
        folder: Path,
        id: str,
        revision: str | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        sources: Mapping[str, Source],
    ) -> None:
        self.folder = folder
        self.id = id
        self.revision = revision
        self.config = config
        self.tensors = tensors
        self._sources = sources

    @classmethod
    def open(
        cls, folder: str | Path, *, id: str | None = None, revision: str | None = None, need_config: bool = True
    ) -> Self:
        """Open a folder of safetensors files.

        Args:
            folder: the folder.
            id: the name to use in messages; the folder by default.
            revision: the Hub commit the folder holds.
            need_config: refuse a folder without `config.json`.

        Raises:
            CheckpointError: no folder, no weights, only pickled weights, or no config.
            HeaderError: a malformed index or header, or an index and headers that disagree.
        """
        folder = Path(folder)
        id = id or str(folder)
        if not folder.is_dir():
            raise CheckpointError(f"model {id}: there is no folder {folder}")
        files, weight_map = _find_weights(folder, id)
        sources: dict[str, Source] = {}
        try:
            tensors: dict[str, TensorInfo] = {}
            for file in files:
                where = f"model {id}, file {file}"
                sources[file] = source = LocalFile(folder / file, where)
                for name, info in _read_header(source, file).items():
                    if name in tensors:
                        raise HeaderError(f"{where}: tensor {name!r} is also in file {tensors[name].file}")
                    tensors[name] = info
            if not tensors:
                raise CheckpointError(f"model {id}: its safetensors files hold no tensor")
            if weight_map is not None:
                _check_index(weight_map, tensors, id)
            config = _read_json(folder / "config.json", f"model {id}, file config.json", required=need_config)
        except BaseException:
            for opened in sources.values():
                opened.close()
            raise
        return cls(folder, id, revision, config, tensors, sources)

    def info(self, name: str) -> TensorInfo:
        """The tensor's entry; raises MissingTensorError."""
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError(f"model {self.id}: there is no tensor {name!r}") from None

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` of the tensor on."""
        if start < 0 or start + len(buffer) > info.nbytes:
            raise ValueError(f"bytes {start}..{start + len(buffer)} of {info.name!r}, which has {info.nbytes}")
        self._sources[info.file].read_into(buffer, info.start + start)

    def will_need(self, info: TensorInfo) -> None:
        """All of the tensor will be read soon."""
        self._sources[info.file].will_need(info.start, info.nbytes)

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor into new memory, in its own dtype."""
        import torch

        info = self.info(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(info, 0, raw.numpy().data)
        return raw.view(torch_dtype(info.dtype)).view(info.shape)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and 64 bytes from three places of every tensor.

        Does not depend on how the tensors are cut into shards. It tells a base model from its fine-tune
        at the cost of a few thousand small reads; it is no proof against an adversary.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            size = min(64, info.nbytes)
            buffer = bytearray(size)
            for start in (0, (info.nbytes - size) // 2, info.nbytes - size):
                self.read_into(info, start, memoryview(buffer))
                digest.update(buffer)
        return digest.hexdigest()

    def side_files(self) -> Iterator[str]:
        """Every non-weight file a merged model takes over verbatim, as sorted relative names.

        Left out: weights and their indexes, hidden files, the model card and the manifest of an earlier
        merge (the output gets its own).
        """
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            ours = str(name) in (CARD_FILE, MANIFEST_FILE)
            if not hidden and not ours and not path.name.endswith(_WEIGHT_SUFFIXES) and path.is_file():
                yield name.as_posix()

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def require_finite(
    values: Tensor, info: TensorInfo, id: str, mend: str = "repair it, or let them through with --allow-nonfinite"
) -> None:
    """Raise CheckpointError where a floating tensor (or part of it) holds NaN or Inf.

    The sum is non-finite if any element is, at a fraction of the cost of a test of each; only where it is
    (a sum may also overflow) are the elements looked at.
    """
    values = values.float() if values.element_size() == 1 else values  # torch cannot sum float8
    if not values.sum().isfinite():
        bad = int(values.isfinite().logical_not().sum())
        if bad:
            raise CheckpointError(
                f"model {id}, file {info.file}: tensor {info.name!r} holds {bad} non-finite values (NaN or Inf); {mend}"
            )


_BLOCK = re.compile(r"^(.*?\b(?:layers|h|blocks|layer|block))\.(\d+)\.")


def decoder_prefix(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name before the block number of the decoder blocks, for example "model.layers"; None: no blocks.

    Where several stacks exist (a vision tower beside a language model), the one with most parameters.
    """
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        if match := _BLOCK.match(name):
            sizes[match[1]] = sizes.get(match[1], 0) + info.numel
    return max(sizes, key=lambda prefix: sizes[prefix]) if sizes else None


def block_index(name: str, prefix: str | None) -> int | None:
    """The decoder block a tensor belongs to, or None: `block_index("model.layers.3.x", "model.layers")` is 3."""
    match = _BLOCK.match(name)
    return int(match[2]) if match and match[1] == prefix else None


def _find_weights(folder: Path, id: str) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files to read and, where there is an index, its weight map."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.exists():
        weight_map = _read_weight_map(index, f"model {id}, file {INDEX_FILE}")
        files = sorted(set(weight_map.values()))
        if single.exists() and SINGLE_FILE not in files:
            raise HeaderError(f"model {id}: both {SINGLE_FILE} and an index of other files: delete the one left over")
        for file in files:
            if not os.path.isfile(folder / file):  # unlike Path.is_file, False for a name the system cannot hold
                raise HeaderError(f"model {id}, file {INDEX_FILE}: names {file}, which is missing")
        return files, weight_map
    if single.exists():
        return [SINGLE_FILE], None
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1 and not _PART.search(found[0]):
        return found, None
    if found:
        raise CheckpointError(
            f"model {id}: no {INDEX_FILE} beside {found[0]} ({len(found)} safetensors files): is a download incomplete?"
        )
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise CheckpointError(
            f"model {id}: only pickled weights ({pickled[0]}), which streammerge never loads; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"model {id}: no safetensors file in {folder}")


def _read_weight_map(path: Path, where: str) -> dict[str, str]:
    weight_map = _read_json(path, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{where}: it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise HeaderError(f"{where}: tensor {name!r} is mapped to {file!r}, which is no safetensors file")
        if PurePosixPath(file).is_absolute() or "\\" in file or ".." in PurePosixPath(file).parts or "\0" in file:
            raise HeaderError(f"{where}: tensor {name!r} is mapped to {file!r}, outside the folder")
    return weight_map


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], id: str) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise HeaderError(f"model {id}, file {INDEX_FILE}: maps tensor {name!r} to {file}, which does not hold it")
    for name, info in tensors.items():
        if name not in weight_map:
            raise HeaderError(
                f"model {id}, file {info.file}: holds tensor {name!r}, which {INDEX_FILE} does not name: "
                "are files of two checkpoints mixed?"
            )


def _read_header(source: Source, file: str) -> dict[str, TensorInfo]:
    prefix = bytearray(min(8, source.size))
    source.read_into(memoryview(prefix), 0)
    raw = bytearray(header_length(bytes(prefix), source.size, source.where))
    source.read_into(memoryview(raw), 8)
    return parse_header(bytes(raw), source.size, file, source.where)


def _read_json(path: Path, where: str, required: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(f"{where}: missing: is this a model folder?")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise HeaderError(f"{where}: larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys(where))
    except OSError as error:
        raise TransferError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: not a JSON object")
    return value
