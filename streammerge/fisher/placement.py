"""Where a Fisher pass runs, what it holds there, and which blocks stay. Imports torch only where a GPU is asked for."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix
from streammerge.checkpoints.header import DTYPES
from streammerge.errors import MemoryBudgetError, RecipeError
from streammerge.fisher.store import FisherSettings
from streammerge.units import format_memory

if TYPE_CHECKING:
    from torch import device as torch_device

    from streammerge.fisher.blocks import BlockModel

GROUP_TOKENS = 512  # tokens that go through a block together
HEAD_BYTES = 8 << 20  # of the head, at a time
SQUARES = 3 << 20  # elements of all sequences' gradients at a time

_FREE_SHARE = 0.9
_IMPORT_BYTES = 420 * 2**20  # a process that has imported torch, transformers and accelerate
_CUDA_BYTES = 600 * 2**20  # what its first use of a GPU adds


@dataclass(frozen=True)
class FisherRun:
    """How a Fisher pass is run. Nothing here changes its result but the device, by rounding.

    Attributes:
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        max_vram: bytes on the GPU; None: 90% of what is free.
        device_map: "auto", or a JSON file of module names and devices, as accelerate's.
        trust_remote_code: run Python code that the model brings.
    """

    device: str | None = None
    max_vram: int | None = None
    device_map: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class FisherMemory:
    """Bytes a Fisher pass takes, from headers alone.

    Attributes:
        block: the largest decoder block, as it is stored.
        work: activations, thin factors, temporaries; whatever the number of blocks.
    """

    block: int
    work: int

    @property
    def streamed(self) -> int:
        """Two blocks, the one in work and the one that is fetched, and the work."""
        return 2 * self.block + self.work


@dataclass(frozen=True)
class FisherPlacement:
    """What `plan` says of a Fisher pass.

    Attributes:
        device: its name.
        stay: how many blocks stay on the device, of how many.
        blocks: how many blocks there are.
        device_bytes: expected peak on a GPU; 0 on the CPU.
        host_bytes: expected peak of the process.
        bytes_to_read: from the base's files.
    """

    device: str
    stay: int
    blocks: int
    device_bytes: int
    host_bytes: int
    bytes_to_read: int


def default_device() -> str:
    """The first GPU where there is one, else the CPU. Where there is no driver, torch is not even imported."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fisher_memory(base: Checkpoint, settings: FisherSettings) -> FisherMemory:
    """What a pass over this model takes, whatever the device."""
    prefix = decoder_prefix(base.tensors)
    compute = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(settings.compute_dtype or "", 0)
    share = _routed_share(base.config)
    blocks: dict[int, int] = {}
    thin: dict[int, int] = {}
    vocabulary = hidden = width = one_by_one = 0
    for name, info in base.tensors.items():
        number = block_index(name, prefix)
        if number is None:
            if len(info.shape) == 2 and info.shape[0] > vocabulary:
                vocabulary, hidden = info.shape
            continue
        blocks[number] = blocks.get(number, 0) + info.nbytes
        width = max(width, DTYPES[info.dtype].bits // 8)
        if len(info.shape) > 1:
            expert = "experts." in name
            one_by_one |= expert
            tokens = sum(info.shape[-2:]) * (share * (info.shape[0] if len(info.shape) > 2 else 1) if expert else 1)
            thin[number] = thin.get(number, 0) + int(tokens)
    compute = compute or width
    tokens = settings.samples * settings.length
    group = settings.length if one_by_one or settings.all_parameters else min(tokens, GROUP_TOKENS)
    widest = max(thin.values(), default=0)
    factors = tokens * widest * compute
    graph = group * widest * (compute + 4)
    head = tokens * (5 * 4 * hidden + 6 * 4 * max(1, HEAD_BYTES // max(1, hidden * width))) + 2 * HEAD_BYTES
    return FisherMemory(max(blocks.values(), default=0), max(factors + graph + 3 * 4 * SQUARES, head))


def _routed_share(config: Mapping[str, Any]) -> float:
    """The part of a mixture's experts that a token goes through."""
    counts = [config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]
    return min(1.0, float(config.get("num_experts_per_tok", 1)) / counts[0]) if counts else 1.0


def place(base: Checkpoint, settings: FisherSettings, run: FisherRun) -> FisherPlacement:
    """What `plan` says of a pass that is yet to come.

    Raises:
        MemoryBudgetError: the GPU's budget is too small, with the smallest that works.
        RecipeError: a device, or a device map, that is none.
    """
    memory = fisher_memory(base, settings)
    prefix = decoder_prefix(base.tensors)
    numbers = {number for name in base.tensors if (number := block_index(name, prefix)) is not None}
    sizes = sum(info.nbytes for name, info in base.tensors.items() if block_index(name, prefix) is not None)
    outside = sum(info.nbytes for info in base.tensors.values()) - sizes
    name = run.device or default_device()
    stay: frozenset[int] = frozenset()
    if name != "cpu" or run.device_map != "auto":
        from streammerge.fisher.measure import build_model  # imports torch and transformers

        model, where = build_model(base, settings, run)
        stay = blocks_that_stay(model, settings, where, run)
    resident = sum(info.nbytes for n, info in base.tensors.items() if block_index(n, prefix) in stay)
    on_device = memory.streamed + resident
    host = _IMPORT_BYTES + (on_device if name == "cpu" else _CUDA_BYTES + 2 * memory.block)
    to_read = outside + 2 * sizes - resident
    return FisherPlacement(name, len(stay), len(numbers), 0 if name == "cpu" else on_device, host, to_read)


def blocks_that_stay(
    model: BlockModel, settings: FisherSettings, device: torch_device, run: FisherRun
) -> frozenset[int]:
    """The blocks that stay on the device between forward and backward; the others are read twice.

    By default as many as accelerate's `infer_auto_device_map` finds room for besides two streamed blocks; on the CPU
    none.

    Raises:
        MemoryBudgetError: not even two blocks fit.
        RecipeError: the device map is none.
    """
    if run.device_map != "auto":
        return _mapped(model, device, Path(run.device_map))
    if device.type == "cpu":
        if run.max_vram is not None:
            raise RecipeError("--max-vram is for a Fisher pass on a GPU; this one runs on the CPU: leave it out")
        return frozenset()
    import torch

    budget = run.max_vram or int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    need = fisher_memory(model.base, settings).streamed
    if need > budget:
        raise MemoryBudgetError(
            f"a Fisher pass of {model.base.id} needs {format_memory(need)} on {device}, --max-vram allows "
            f"{format_memory(budget)}: give more, fewer --fisher-samples, or --device cpu"
        )
    return room_for_blocks(model, budget - need)


def room_for_blocks(model: BlockModel, room: int) -> frozenset[int]:
    """The blocks that accelerate puts on a device with that many bytes."""
    import torch
    from accelerate import infer_auto_device_map

    dtypes = {
        f"{index}.{slot.parameter.removeprefix(f'{model.prefix}.{index}.')}": slot.dtype
        for index, layout in enumerate(model.layouts)
        for slot in layout.slots
    }
    names = [type(block).__name__ for block in model.blocks]
    placed = infer_auto_device_map(
        torch.nn.ModuleList(model.blocks),
        max_memory={0: room, "cpu": 0, "disk": 2**60},
        no_split_module_classes=sorted(set(names)),
        special_dtypes=dtypes,
        clean_result=False,
    )
    on_device = {key.split(".")[0] for key, place in placed.items() if place == 0}
    elsewhere = {key.split(".")[0] for key, place in placed.items() if place != 0}
    return frozenset(range(len(names)) if "" in on_device else (int(key) for key in on_device - elsewhere))


def _mapped(model: BlockModel, device: torch_device, path: Path) -> frozenset[int]:
    """The blocks that a file maps to the device of the pass."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"--device-map {path}: {error.strerror}: give auto, or a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"--device-map {path}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(entries, dict) or not all(isinstance(place, (str, int)) for place in entries.values()):
        raise RecipeError(
            f'--device-map {path}: must be a mapping like {{"{model.prefix}.0": 0, "{model.prefix}": "disk"}}'
        )
    modules = {name for name, _ in model.model.named_modules()}
    if unknown := next((name for name in entries if name not in modules), None):
        raise RecipeError(f"--device-map {path}: {unknown!r} is no module of {type(model.model).__name__}")
    here = {str(device), device.type} | (
        {device.index or 0, str(device.index or 0)} if device.type == "cuda" else set()
    )
    stay = set()
    for index in range(len(model.blocks)):
        name = f"{model.prefix}.{index}"
        owners = [key for key in entries if key == "" or name == key or name.startswith(f"{key}.")]
        if not owners:
            raise RecipeError(f"--device-map {path}: it does not place {name!r}")
        place = entries[max(owners, key=len)]
        if place in here:
            stay.add(index)
        elif place not in ("cpu", "disk"):
            raise RecipeError(f"--device-map {path}: {name!r} is on {place!r}: a block is on {device}, cpu or disk")
    return frozenset(stay)
