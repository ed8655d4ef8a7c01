"""A small checkpoint of bytes in two shards, written tensor by tensor: how it is interrupted and finished."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streammerge.checkpoints.layout import Shard, plan_shards
from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.writer import CheckpointWriter

SIZES = {"a": 70, "b": 200, "empty": 0, "d": 150, "e": 300, "f": 9}
STATE = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDS_OF = [["a", "b", "empty", "d"], ["e", "f"]]
IDENTITY = {"seed": 0}
NEVER, ALWAYS = 1e9, -1.0  # values of SYNC_SECONDS


def planned() -> tuple[Shard, ...]:
    return plan_shards(((name, "U8", (size,)) for name, size in SIZES.items()), 420)


def start(out: Path, *, fresh: bool = False) -> CheckpointWriter:
    return CheckpointWriter(out, planned(), IDENTITY, fresh=fresh)


def entry(name: str) -> dict[str, Any]:
    return {"shape": (SIZES[name],), "norm": [1.5, None], "of": {"kept": (1, 2)}}


def fill(target: CheckpointWriter, names: Iterable[str]) -> None:
    for name in names:
        target.complete(name, entry(name), [target.write(name, 0, memoryview(STATE[name]))])


def interrupted(out: Path, names: Iterable[str]) -> None:
    """A run that stops in an orderly way after some tensors."""
    with start(out) as target:
        fill(target, names)


def finish(out: Path) -> list[str]:
    """Finish the run; the tensors that had to be written."""
    with start(out) as target:
        missing = [name for name in STATE if not target.is_complete(name)]
        assert target.entries.keys() == STATE.keys() - set(missing)
        fill(target, missing)
        target.publish({"config.json": b"{}"})
        assert target.entries == {name: json.loads(json.dumps(entry(name))) for name in STATE}
    return missing


def lines(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal after the identity, read without the code under test."""
    data = (out / WORK_DIR / "journal").read_bytes()
    return [json.loads(line[9:]) for line in data.splitlines(keepends=True)[1:] if line.endswith(b"\n")]


def recorded(out: Path) -> set[str]:
    return {name for line in lines(out) for name in line["tensors"]}
