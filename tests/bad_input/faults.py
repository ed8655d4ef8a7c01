"""Models that are spoilt, each with what must be said of it, and records of Fishers that are edited."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from bad_input.refusals import Spoil
from tiny_models import (
    EMBEDDING,
    INDEX,
    MATRIX,
    SHARD,
    WEIGHTS,
    edit,
    edit_config,
    edit_header,
    put,
    put_header,
    put_index,
)


def cut(size: int) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def offsets(start: int, stop: int, name: str = MATRIX) -> Spoil:
    """Move one tensor's bytes by this much."""

    def change(entries: dict[str, Any]) -> None:
        place = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [place[0] + start, place[1] + stop]

    return lambda folder: edit_header(folder, change)


def duplicate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    text = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]].decode().rstrip()
    entry = json.dumps(json.loads(text)[MATRIX])
    put_header(folder, f'{text[:-1]},"{MATRIX}":{entry}}}'.encode())


def point_outside(folder: Path) -> None:
    """An index that names a good file, but one of the neighbour's."""
    outside = folder.parent / f"beside-{folder.name}.safetensors"
    (folder / WEIGHTS).rename(outside)
    weight_map = dict.fromkeys(json.loads(header_of(outside)), f"../{outside.name}")
    weight_map.pop("__metadata__")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def header_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]


def empty(folder: Path) -> None:
    rmtree(folder)
    folder.mkdir()


IN_FILE = f"file {WEIGHTS}: "
LAST = "model.norm.weight"  # in the file
BROKEN: dict[str, tuple[Spoil, list[str]]] = {
    "cut in the data": (cut(-10), [IN_FILE, "truncated or corrupt: tensor", "download the file again"]),
    "cut in the header": (cut(100), [IN_FILE, "truncated: the header ends at byte"]),
    "cut in the length": (cut(5), [IN_FILE, "truncated: 5 bytes cannot hold a safetensors header"]),
    "no bytes at all": (cut(0), [IN_FILE, "truncated: 0 bytes"]),
    "header longer than the file": (lambda f: put_header(f, b"{}", 10**6), [IN_FILE, "ends at byte 1000008, the file"]),
    "header of exabytes": (lambda f: put_header(f, b"{}", 2**60), [IN_FILE, "not a safetensors file: it announces"]),
    "header no JSON": (lambda f: put_header(f, b"{nonsense"), [IN_FILE, "the header is not valid JSON"]),
    "overlapping offsets": (offsets(-4, -4), [IN_FILE, MATRIX, "overlaps the tensor before it"]),
    "a gap": (offsets(4, 4), [IN_FILE, MATRIX, "leaves a gap before it"]),
    "offsets beyond the file": (offsets(4, 4, LAST), [IN_FILE, LAST, "truncated or corrupt"]),
    "offsets backwards": (offsets(10**6, 0), [IN_FILE, MATRIX, "bad data_offsets"]),
    "offsets unlike the shape": (offsets(0, 4), [IN_FILE, MATRIX, "F32 [32, 16] does not fit its 2052 bytes"]),
    "unknown dtype": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F17")),
        [IN_FILE, MATRIX, "unknown dtype 'F17'"],
    ),
    "duplicate name": (duplicate, [IN_FILE, f"duplicate name '{MATRIX}'"]),
    "index names a missing file": (
        lambda f: put_index(f, **{MATRIX: "gone.safetensors"}),
        [f"file {INDEX}: names gone.safetensors, which is missing"],
    ),
    "index names a file outside": (point_outside, [f"file {INDEX}: ", "outside the folder"]),
    "index with an absolute path": (
        lambda f: put_index(f, **{MATRIX: "/dev/null.safetensors"}),
        [f"file {INDEX}: tensor '{MATRIX}' is mapped to '/dev/null.safetensors', no file of the folder: it is an"],
    ),
    "index of other tensors": (
        lambda f: put_index(f, ghost=SHARD),
        [f"file {INDEX}: maps tensor 'ghost' to {SHARD}, which does not hold it"],
    ),
    "only pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        ["only pickled weights (pytorch_model.bin)", "convert them", "save_pretrained(NEW_FOLDER)"],
    ),
    "one shard of two": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00002.safetensors"),
        [f"no {INDEX} beside model-00001-of-00002.safetensors", "is a download incomplete?"],
    ),
    "empty folder": (empty, ["no safetensors file in "]),
    "no folder": (rmtree, ["there is no such folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["file config.json: missing: is this a model folder?"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ["file config.json: not valid JSON"]),
    "quantised by its config": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        ["file config.json: quantised (gptq)", "dequantise it first"],
    ),
    "quantised part of a larger model": (
        lambda f: edit_config(f, text_config={"quantization_config": {"quant_method": "fp8"}}),
        ["file config.json: quantised (fp8)", "dequantise it first"],
    ),
    **{
        f"quantised by its {suffix}": (
            lambda f, name=f"model.layers.0.mlp.up_proj.{suffix}": put(f, name, torch.ones(2, dtype=torch.int32)),
            [IN_FILE, f"tensor 'model.layers.0.mlp.up_proj.{suffix}' (I32)", "dequantise the model first"],
        )
        for suffix in ("qweight", "weight_scale_inv", "scales", "absmax", "gate_blocks")
    },
    "quantised by F8_E8M0": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F8_E8M0", shape=[32, 64])),
        [IN_FILE, f"tensor '{MATRIX}' (F8_E8M0) is part of a quantised weight", "dequantise the model first"],
    ),
    "quantised by F4": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F4", shape=[32, 128])),
        [IN_FILE, f"tensor '{MATRIX}' (F4) is part of a quantised weight", "dequantise the model first"],
    ),
}


UNLIKE: dict[str, tuple[Spoil, str]] = {
    "shape": (lambda f: put(f, MATRIX, torch.ones(32, 8)), f"tensor '{MATRIX}' is [32, 8], in the base [32, 16]"),
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(MATRIX)), f"tensor '{MATRIX}' is missing"),
    "extra tensor": (lambda f: put(f, "score.weight", torch.ones(2)), "tensor 'score.weight' has no counterpart"),
    "extra head": (lambda f: put(f, "lm_head.weight", torch.ones(2, 2)), "tensor 'lm_head.weight' has no counterpart"),
    "integers": (
        lambda f: put(f, MATRIX, torch.ones(32, 16, dtype=torch.int32)),
        f"tensor '{MATRIX}' is I32, in the base F32",
    ),
    "architecture": (lambda f: edit_config(f, model_type="llama"), "config model_type is 'llama', in the base 'qwen2'"),
    "vocabulary in the config": (lambda f: edit_config(f, vocab_size=50), "config vocab_size is 50, in the base 48"),
    "vocabulary in the tensor": (
        lambda f: put(f, EMBEDDING, torch.ones(50, 16)),
        f"tensor '{EMBEDDING}' is [50, 16], in the base [48, 16]",
    ),
    "heads": (lambda f: edit_config(f, num_attention_heads=4), "config num_attention_heads is 4, in the base 2"),
    "blocks": (lambda f: edit_config(f, num_hidden_layers=3), "config num_hidden_layers is 3, in the base 2"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), "config hidden_act is 'relu', in the base 'silu'"),
}


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "fisher.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
