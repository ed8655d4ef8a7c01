"""A checkpoint: its tensors by name, its config, its other files. Knows nothing of merging."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from streammerge.checkpoints.files import Files, LocalFolder
from streammerge.checkpoints.fingerprint import fingerprint, fingerprint_bytes
from streammerge.checkpoints.header import DTYPES, TensorInfo, parse_header
from streammerge.checkpoints.side_files import find_side_files
from streammerge.checkpoints.source import Part, Source
from streammerge.checkpoints.weight_files import check_index, find_weights, guess_headers
from streammerge.errors import CheckpointError, HeaderError, MissingTensorError

if TYPE_CHECKING:
    from torch import Tensor, dtype

MANIFEST_FILE = "streammerge.json"
CARD_FILE = "README.md"
PLOT_FILE = "merge-coefficients.png"
REPORT_FILE = "report.html"


def torch_dtype(name: str) -> dtype:
    """The torch dtype of a safetensors dtype name; raises CheckpointError where torch has none."""
    import torch

    found: dtype | None = getattr(torch, DTYPES[name].torch_name or "", None)
    if found is None:
        raise CheckpointError(f"torch {torch.__version__} has no dtype for {name}")
    return found


class Checkpoint:
    """Names, shapes, config and side files of a model; reads any byte range of any tensor.

    Opening reads headers, index and config only, and validates them. Use as a context manager, or call
    `close`. Safe to read from several threads.

    Attributes:
        files: the files it is made of, in a folder or on the Hub.
        id: how the user named the model: a path, or a Hub repository id.
        revision: the commit on the Hub, or None.
        config: the parsed `config.json` ({} where the folder has none).
        tensors: TensorInfo by name, in the order of the files and of the bytes in them.
    """

    def __init__(
        self,
        files: Files,
        id: str,
        revision: str | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        sources: Mapping[str, Source],
    ) -> None:
        self.files = files
        self.id = id
        self.revision = revision
        self.config = config
        self.tensors = tensors
        self._sources = sources
        self._sums: dict[str, int] = {}

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
        return cls.of(LocalFolder(folder, id or str(folder)), revision=revision, need_config=need_config)

    @classmethod
    def of(cls, files: Files, *, revision: str | None = None, need_config: bool = True) -> Self:
        """Open the model that some files make up; see `open`."""
        id = files.id
        names, weight_map = find_weights(files)
        sources = files.open(guess_headers(names, weight_map))
        try:
            tensors: dict[str, TensorInfo] = {}
            for file, source in sources.items():
                for name, info in parse_header(source.header(), source.size, file, source.where).items():
                    if name in tensors:
                        raise HeaderError(f"{source.where}: tensor {name!r} is also in file {tensors[name].file}")
                    tensors[name] = info
            if not tensors:
                raise CheckpointError(f"model {id}: its safetensors files hold no tensor")
            if weight_map is not None:
                check_index(weight_map, tensors, id)
            config = files.json("config.json", required=need_config)
        except BaseException:
            for opened in sources.values():
                opened.close()
            raise
        return cls(files, id, revision, config, tensors, sources)

    @property
    def folder(self) -> Path | None:
        """The local folder the model lies in; None for one on the Hub, whatever of it is on this machine."""
        return self.files.folder

    def info(self, name: str) -> TensorInfo:
        """The tensor's entry; raises MissingTensorError."""
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError(f"model {self.id}: there is no tensor {name!r}") from None

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` of the tensor on."""
        self.read_many([(info, start, buffer)])

    def read_many(self, parts: Iterable[tuple[TensorInfo, int, memoryview]]) -> None:
        """`read_into` for several (tensor, start, buffer), what is adjacent in a file in one go."""
        by_file: dict[str, list[Part]] = {}
        for info, start, buffer in parts:
            if start < 0 or start + len(buffer) > info.nbytes:
                raise ValueError(f"bytes {start}..{start + len(buffer)} of {info.name!r}, which has {info.nbytes}")
            by_file.setdefault(info.file, []).append((info.start + start, buffer))
        for file, of_file in by_file.items():
            self._sources[file].read_many(of_file)

    def is_known(self, info: TensorInfo) -> bool:
        """Whether `confirm` has been told of the tensor."""
        return info.name in self._sums

    def confirm(self, info: TensorInfo, checksum: int) -> None:
        """Compare what was just read of the whole tensor with what was read of it before, the first time with nothing.

        Raises:
            CheckpointError: the file is being written, or disk or memory fail.
        """
        if self._sums.setdefault(info.name, checksum) != checksum:
            raise CheckpointError(
                f"model {self.id}, file {info.file}: tensor {info.name!r} changed between two readings: run the "
                "command again once nothing writes there; if nothing does, check disk and memory"
            )

    def confirmed(self, since: int = 0) -> dict[str, int]:
        """What `confirm` was told for the first time, by name, but for the first `since` of them."""
        return dict(islice(self._sums.items(), since, None))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes, and time of the last change in ns, of every weight file of a local folder."""
        stamps = {file: source.stamp for file, source in self._sources.items() if self.folder is not None}
        return {file: stamp for file, stamp in stamps.items() if stamp is not None}

    def require_unchanged(self) -> None:
        """Raise CheckpointError where a local weight file is not the one that was opened, or was written to since."""
        for source in self._sources.values():
            source.require_unchanged()

    def will_need(self, info: TensorInfo) -> None:
        """All of the tensor will be read soon."""
        self._sources[info.file].will_need(info.start, info.nbytes)

    def is_streamed(self, info: TensorInfo) -> bool:
        """Whether the tensor's bytes travel over the network every time they are read."""
        return self._sources[info.file].streamed

    @property
    def is_local(self) -> bool:
        """Whether all of it is read from files that are there already."""
        return all(source.stamp is not None for source in self._sources.values())

    @property
    def missing_bytes(self) -> int:
        """What will have to be downloaded into the Hub's cache before all tensors can be read."""
        return sum(source.missing for source in self._sources.values())

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
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.tensors, self._sources)

    def fingerprint_bytes(self) -> int:
        """How many bytes travel for the fingerprint."""
        return fingerprint_bytes(self.tensors, self._sources)

    def side_files(self) -> list[str]:
        """Every non-weight file a merged model takes over verbatim, see `find_side_files`."""
        return find_side_files(self.files, (CARD_FILE, MANIFEST_FILE, PLOT_FILE, REPORT_FILE))

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def require_finite(
    values: Tensor, info: TensorInfo, id: str, mend: str = "repair it, or let them through with --allow-nonfinite"
) -> None:
    """Raise CheckpointError where a floating tensor (or part of it) holds NaN or Inf."""
    if bad := count_nonfinite(values):
        raise CheckpointError(
            f"model {id}, file {info.file}: tensor {info.name!r} holds {bad} non-finite values (NaN or Inf); {mend}"
        )


def count_nonfinite(values: Tensor) -> int:
    """How many elements are NaN or Inf.

    The sum is non-finite if any element is, at a fraction of the cost of a test of each; only where it is
    (a sum may also overflow) are the elements looked at.
    """
    values = values.float() if values.element_size() == 1 else values  # torch cannot sum float8
    return 0 if math.isfinite(values.sum().item()) else int(values.isfinite().logical_not().sum())


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
