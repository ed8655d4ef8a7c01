"""Which decoder blocks stay on the device between the forward and the backward walk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import infer_auto_device_map

from streammerge.errors import MemoryBudgetError, RecipeError
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.placement import FisherRun, fisher_memory
from streammerge.fisher.store import FisherSettings
from streammerge.units import format_memory

_FREE_SHARE = 0.9


def blocks_that_stay(
    model: BlockModel, settings: FisherSettings, device: torch.device, run: FisherRun
) -> frozenset[int]:
    """The blocks that stay on the device between forward and backward; the others are read twice.

    By default as many as accelerate's `infer_auto_device_map` finds room for besides two streamed blocks; on the CPU
    none.

    Raises:
        MemoryBudgetError: not even two blocks fit.
        RecipeError: the device map is none.
    """
    if device.type == "cpu" and run.max_vram is not None:
        raise RecipeError("--max-vram is for a Fisher pass on a GPU; this one runs on the CPU: leave it out")
    if run.device_map != "auto":
        return _mapped(model, device, Path(run.device_map))
    if device.type == "cpu":
        return frozenset()
    budget = run.max_vram or int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    need = fisher_memory(model.base, settings).on_gpu
    if need > budget:
        raise MemoryBudgetError(
            f"a Fisher pass of {model.base.id} needs {format_memory(need)} on {device}, --max-vram allows "
            f"{format_memory(budget)}: give more, fewer --fisher-samples, or --device cpu"
        )
    return room_for_blocks(model, budget - need)


def room_for_blocks(model: BlockModel, room: int) -> frozenset[int]:
    """The blocks that accelerate puts on a device with that many bytes."""
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


def _mapped(model: BlockModel, device: torch.device, path: Path) -> frozenset[int]:
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
            places = " or ".join(dict.fromkeys([str(device), "cpu", "disk"]))
            raise RecipeError(f"--device-map {path}: {name!r} is on {place!r}: a block is on {places}")
    return frozenset(stay)
