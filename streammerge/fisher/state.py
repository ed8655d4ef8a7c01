"""What a Fisher pass needs to go on after an interruption: hidden states and gradients between the blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from streammerge.checkpoints import disk
from streammerge.checkpoints.output import transfer_errors

_FILE = re.compile(r"(input|gradient|normaliser|alone)-(\d+)\.safetensors$")


class WalkState:
    """A folder of small files, each whole or not there: `input-i` of block i, `gradient-i` at that input.

    The last block's output is the input of a block that does not exist; so is its gradient. `alone` says that the
    sequences go through the blocks one by one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with transfer_errors(folder, "cannot be prepared"):
            disk.make_folder(folder)

    def save(self, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Durable when it returns."""
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with transfer_errors(self._path(kind, index), "cannot be written"):
            disk.replace_file(self._path(kind, index), content)

    def load(self, kind: str, index: int) -> dict[str, Tensor]:
        with transfer_errors(self._path(kind, index), "cannot be read"):
            # clones are aligned like any tensor: matrix products round by alignment on some processors
            return {name: tensor.clone() for name, tensor in load(disk.read_file(self._path(kind, index))).items()}

    def forget(self, kind: str, index: int) -> None:
        with transfer_errors(self._path(kind, index), "cannot be removed"):
            disk.remove(self._path(kind, index))

    def clear(self) -> None:
        """Forget everything, the latest first, so that an interruption leaves a beginning."""
        for kind in ("normaliser", "gradient", "input"):
            for index in reversed(self.indices(kind)):
                self.forget(kind, index)

    def indices(self, kind: str) -> list[int]:
        """The numbers of the files of a kind that are there, in order."""
        matches = (_FILE.match(path.name) for path in self.folder.iterdir())
        return sorted(int(match[2]) for match in matches if match and match[1] == kind)

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:04}.safetensors"
