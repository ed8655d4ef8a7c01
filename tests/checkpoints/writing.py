"""A small checkpoint of torch tensors in three shards: how it is written, interrupted, killed and read back."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint, torch_dtype
from streammerge.checkpoints.header import DTYPES
from streammerge.checkpoints.layout import Shard, plan_shards
from streammerge.checkpoints.output import check_output
from streammerge.checkpoints.weight_files import INDEX_FILE
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import StreammergeError

State = Mapping[str, torch.Tensor]
IDENTITY: dict[str, Any] = {"recipe": {"method": "linear", "t": (1, 2)}, "seed": 0}


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


STATE: State = {  # three shards of at most LIMIT bytes, mixed widths in the first
    "a": seeded(33, dtype=torch.bfloat16),
    "b": seeded(5, 10, seed=1),
    "empty": torch.zeros(0, 4),
    "c": seeded(12, 20, seed=2),
    "é": seeded(10, 10, seed=3),
    "z": torch.tensor(41),
}
LIMIT = 600
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SHARDS_OF = [["a", "b", "empty"], ["c"], ["z", "é"]]
OTHER: State = {name: torch.ones_like(value) for name, value in STATE.items()}


def dtype_name(value: torch.Tensor) -> str:
    return next(name for name, row in DTYPES.items() if row.torch_name and torch_dtype(name) is value.dtype)


def planned(state: State, limit: int = LIMIT) -> tuple[Shard, ...]:
    return plan_shards(((name, dtype_name(value), tuple(value.shape)) for name, value in state.items()), limit)


def raw(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fill(writer: CheckpointWriter, state: State, names: Iterable[str] | None = None) -> None:
    """Write the tensors that are not complete yet, as an engine does."""
    for name in state if names is None else names:
        if not writer.is_complete(name):
            written = writer.write(name, 0, memoryview(raw(state[name])))
            writer.complete(name, {"numel": state[name].numel()}, [written])
    writer.wait()


def others(shards: Iterable[Shard]) -> dict[str, bytes | Path]:
    """What is published besides the shards, with the manifest that names every file."""
    names = [shard.file for shard in shards]
    files = ["config.json", "original/params.json", MANIFEST_FILE, *names, *([INDEX_FILE] if len(names) > 1 else [])]
    return {
        "config.json": b'{"model_type": "tiny"}',
        "original/params.json": b"{}",
        MANIFEST_FILE: json.dumps({"files": files}).encode(),
    }


def run(out: Path, state: State = STATE, limit: int = LIMIT, *, fresh: bool = False, seed: int = 0) -> None:
    """A whole run, from check to publication."""
    check_output(out, [], overwrite=fresh)
    shards = planned(state, limit)
    with CheckpointWriter(out, shards, {**IDENTITY, "seed": seed}, fresh=fresh) as writer:
        fill(writer, state)
        writer.publish(others(shards))


def interrupted(out: Path, names: Iterable[str]) -> dict[str, Any]:
    """A run that stops after some tensors; what it had finished."""
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE, names)
        return writer.finished


def resumed(out: Path) -> set[str]:
    """Finish the run; the shards that did not have to be written again."""
    check_output(out, [], overwrite=False)
    shards = planned(STATE)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        found = {shard.file for shard in shards if all(writer.is_complete(info.name) for info in shard.tensors)}
        fill(writer, STATE)
        writer.publish(others(shards))
    return found


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> None:
    real, calls = getattr(owner, name), iter(range(10**6))

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def loads(folder: Path) -> dict[str, bytes] | None:
    """What the folder loads as; None where it does not load."""
    try:
        with Checkpoint.open(folder) as checkpoint:
            return {name: raw(checkpoint.tensor(name)) for name in checkpoint.tensors}
    except StreammergeError:
        return None


def bits(state: State) -> dict[str, bytes]:
    return {name: raw(value) for name, value in state.items()}
