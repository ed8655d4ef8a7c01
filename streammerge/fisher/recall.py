"""What linear functions gave on the way forward, kept on disk so that the way back need not compute it again.

On a processor the products of the forward pass are a quarter of all work; writing their results, 16-bit numbers for
a few hundred tokens, and reading them back costs almost nothing. It is scratch: nothing but time depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from streammerge.checkpoints import disk
from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.output import transfer_errors


class Recall:
    """Results by block, in the order of the calls. The file has no name and vanishes with the process.

    Use as a context manager.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with transfer_errors(folder, "a scratch file cannot be made"):
            self._file = disk.scratch_file(folder)  # closed by __exit__
        self._end = 0
        self._places: dict[int, list[tuple[int, torch.Size, torch.dtype]]] = {}
        self._block, self._next = 0, 0

    def begin(self, block: int) -> None:
        """The next `put` or `get` is the first of this block."""
        self._block, self._next = block, 0

    def put(self, result: Tensor) -> None:
        result = result.detach().contiguous()
        self._places.setdefault(self._block, []).append((self._end, result.shape, result.dtype))
        raw = as_bytes(result)
        with transfer_errors(self._folder, "a scratch file cannot be written"):
            disk.write_at(self._file.fileno(), raw, self._end)
        self._end += len(raw)

    def get(self) -> Tensor | None:
        """The next result of the block; None where the block was computed by another process, or not at all."""
        places = self._places.get(self._block)
        if places is None:
            return None
        start, shape, dtype = places[self._next]
        self._next += 1
        result = torch.empty(shape, dtype=dtype)
        raw = as_bytes(result)
        with transfer_errors(self._folder, "a scratch file cannot be read"):
            if disk.read_into(self._file.fileno(), raw, start) < len(raw):
                raise OSError("it ended early")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
