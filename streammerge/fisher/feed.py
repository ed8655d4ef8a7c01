"""Decoder blocks from the files to the device, the next one while this one computes.

On the CPU one block is in memory, the one in work; the system is told of the next one and reads it into its own cache.
On a GPU there are two: the bytes go through two pinned host buffers and are copied on a side stream. A block that is
placed on the device is read once and stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, require_finite, torch_dtype
from streammerge.checkpoints.checksum import part_sum
from streammerge.fisher.names import Part
from streammerge.fisher.phases import Phases

_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the bytes of its block."""

    parameter: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    parts: tuple[Part, ...]

    def view(self, raw: Tensor) -> Tensor:
        """The parameter's values in the block's bytes."""
        stop = self.start + self.dtype.itemsize * self.shape.numel()
        return raw[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BlockLayout:
    """Where everything of one block lies when its bytes are in memory."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, torch.Size, tuple[Part, ...]]]) -> Self:
        slots, position = [], 0
        for name, shape, parts in parameters:
            dtype = torch_dtype(parts[0].tensor.dtype)
            slots.append(Slot(name, dtype, shape, position, parts))
            position += -(-dtype.itemsize * shape.numel() // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(slots), position)


class BlockFeed:
    """Hands out the bytes of blocks in a known order. Use as a context manager.

    Args:
        blocks: the checkpoint and the layout of every block; blocks of several models may be fed in turn.
        order: indices into `blocks` in the order in which `take` will ask for them.
        device: where the bytes are wanted.
        stay: blocks that stay on the device once they are there.
        phases: takes the time of reading and copying.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Checkpoint, BlockLayout]],
        order: Sequence[int],
        device: torch.device,
        stay: Collection[int],
        phases: Phases,
    ) -> None:
        self._models = [model for model, _ in blocks]
        self._layouts, self._order = [layout for _, layout in blocks], list(order)
        self._device, self._stay, self._phases = device, frozenset(stay), phases
        self._position = 0
        self._seen: set[int] = set()
        self._resident: dict[int, Tensor] = {}
        self._hosts: list[_Buffer] = []
        self._reader = ThreadPoolExecutor(1, "streammerge-read")
        self._next: Future[_Loaded] | None = None
        self._current: _Loaded | None = None

    def take(self) -> tuple[int, Tensor]:
        """The next block of the order and its bytes on the device; those of the one before may be overwritten."""
        index = self._order[self._position]
        if self._current is not None and self._current.index != index:
            self._current.release()
            self._current = None
        if self._current is None:
            future = self._next or self._reader.submit(self._load, index)
            self._next = None
            self._current = future.result()
            self._current.wait()
        self._position += 1
        following = self._order[self._position] if self._position < len(self._order) else index
        if following != index and self._device.type == "cpu":
            self._announce(following)
        elif following != index and self._next is None:
            self._next = self._reader.submit(self._load, following)
        return index, self._current.raw

    def _announce(self, index: int) -> None:
        if index not in self._resident:
            for slot in self._layouts[index].slots:
                for part in slot.parts:
                    self._models[index].will_need(part.tensor)

    def _load(self, index: int) -> _Loaded:
        """Runs on the reading thread."""
        if index in self._resident:
            return _Loaded(index, self._resident[index], None)
        layout, stays = self._layouts[index], index in self._stay
        if self._device.type == "cpu" and stays:
            raw = torch.empty(layout.size, dtype=torch.uint8)
            self._read(index, raw)
            self._resident[index] = raw
            return _Loaded(index, raw, None)
        buffer = self._free_buffer()
        buffer.busy = True
        self._read(index, buffer.host)
        if self._device.type == "cpu":
            return _Loaded(index, buffer.host, buffer)
        return self._copy(index, buffer, stays)

    def _copy(self, index: int, buffer: _Buffer, stays: bool) -> _Loaded:
        """Queue the copy of a pinned buffer to the device on the side stream."""
        size = self._layouts[index].size
        with self._phases.time("copy"), torch.cuda.stream(buffer.stream):
            if stays:
                raw = torch.empty(size, dtype=torch.uint8, device=self._device)
                self._resident[index] = raw
            else:
                raw = buffer.on_device(self._device)
                buffer.stream.wait_event(buffer.used)
            raw[:size].copy_(buffer.host[:size], non_blocking=True)
            buffer.copied.record(buffer.stream)
        return _Loaded(index, raw, buffer, buffer.copied)

    def _free_buffer(self) -> _Buffer:
        for buffer in self._hosts:
            if not buffer.busy:
                buffer.ready_for_reading()
                return buffer
        assert len(self._hosts) < 2, "a third block is asked for"
        self._hosts.append(_Buffer(max(layout.size for layout in self._layouts), self._device))
        return self._hosts[-1]

    def _read(self, index: int, raw: Tensor) -> None:
        first, model = index not in self._seen, self._models[index]
        with self._phases.time("read"):
            parts = [
                (part.tensor, slot.view(raw).view(-1)[part.start : part.start + part.tensor.numel])
                for slot in self._layouts[index].slots
                for part in slot.parts
            ]
            model.read_many((tensor, 0, as_bytes(values)) for tensor, values in parts)
            for tensor, values in parts:
                self._phases.read(tensor.nbytes)
                model.confirm(tensor, part_sum(as_bytes(values)))
                if first:
                    require_finite(values, tensor, model.id, "repair it: it cannot be walked")
        self._seen.add(index)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._hosts.clear()
        self._resident.clear()
        self._current = self._next = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Buffer:
    """Room for one block on the host, and for one on the GPU where there is one."""

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self.busy = False
        self._on_device: Tensor | None = None
        if cuda:
            self.stream = torch.cuda.Stream(device)
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()

    def on_device(self, device: torch.device) -> Tensor:
        if self._on_device is None:
            self._on_device = torch.empty(len(self.host), dtype=torch.uint8, device=device)
        return self._on_device

    def ready_for_reading(self) -> None:
        """Wait until the copy out of the host buffer is done."""
        if self.host.is_pinned():
            self.copied.synchronize()


@dataclass
class _Loaded:
    index: int
    raw: Tensor
    buffer: _Buffer | None
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream(self.raw.device).wait_event(self.copied)

    def release(self) -> None:
        """The block is done with; what the device has still queued of it goes first."""
        if self.buffer is not None:
            if self.copied is not None:
                self.buffer.used.record(torch.cuda.current_stream(self.raw.device))
            self.buffer.busy = False
