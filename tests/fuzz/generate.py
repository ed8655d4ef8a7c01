"""Inputs that are nearly right, from a seeded generator: a good one with a few faults in its structure or bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import yaml
from fuzz.targets import PARTS, SHARDS, file_with, signed

from streammerge.checkpoints.header import DTYPES
from streammerge.methods import METHODS

_DEEP: Any = "end"
for _ in range(60):
    _DEEP = [_DEEP]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -0.0, 1.5, 1e308),
    *(float("inf"), float("nan"), "", "a", "a" * 1500, "\ud800", "\0", "\x1b[31m", "\u202e", "é", "e\u0301"),
    *("../x", "/x", "C:\\x", "..\\x", "x/../../y", "model.safetensors", "a/b", ".", "true", "5GB", "1:1:1", "~"),
    *([], [[]], {}, [0], [1, 2, 3], ["a"], {"a": 1}, {"": {}}, [2**62] * 70, _DEEP, "__metadata__", "<<", "!!x"),
]
TOKENS: list[bytes] = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"-", b"0", b"1e9"),
    *(b"NaN", b"Infinity", b"null", b"true", b"\0", b"\n", b"\r\n", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b" ", b"\t"),
    *(b"\xef\xbb\xbf", b"9" * 30, b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b"&a ", b"*a ", b"<<: ", b"- ", b"!!int "),
    *(b"!!timestamp ", b"!!python/name:os.system ", b"? ", b"| ", b"#", b"%YAML 9.9\n", b"---\n", b"...\n", b"`", b"@"),
    *(b'"__metadata__":{},', b'"a":', b"../", b"0x", b"1:1", b"2024-99-99", b".inf", b"\xe2\x80\xae", b"\xc2\x85"),
]


def header(rng: Random) -> bytes:
    """A safetensors file."""
    table: dict[Any, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    position = 0
    for number in range(rng.randrange(5)):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        table[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    raw = _damaged(rng, json.dumps(_changed(rng, table)).encode())
    content = file_with(raw, bytes(position))
    if rng.random() < 0.1:
        content = struct.pack("<Q", rng.choice([0, 1, len(raw) + 1, 2**31, 2**63, 2**64 - 1])) + content[8:]
    return content[: rng.randrange(len(content))] if rng.random() < 0.1 else content


def index(rng: Random) -> bytes:
    weight_map = {name: file for file, names in PARTS.items() for name in names}
    return _damaged(rng, json.dumps(_changed(rng, {"metadata": {"total_size": 3}, "weight_map": weight_map})).encode())


def recipe(rng: Random) -> bytes:
    method = rng.choice(list(METHODS))
    own = {key: rng.choice([0.5, 1, "auto", [1, 2], None, True]) for key in METHODS[method].Parameters.model_fields}
    values = {
        "base": "org/base",
        "models": ["org/ft", {"model": "org/ft2", "parameters": {"coefficient": 0.5}}],
        "method": method,
        "parameters": {key: value for key, value in own.items() if rng.random() < 0.3},
        "fisher": {"samples": 2},
        "max_shard_bytes": "5GB",
    }
    return _damaged(rng, _as_yaml(_changed(rng, values)))


def journal(rng: Random) -> bytes:
    lines: list[Any] = [{"identity": {"version": "1", "layout": "0"}}]
    for _ in range(rng.randrange(6)):
        shard = rng.choice(SHARDS)
        entries = {info.name: {"numel": 1} for info in shard.tensors}
        finished = {"file": shard.file, "bytes": shard.size, "sha256": "0" * 64, "tensors": entries}
        lines.append(
            rng.choice([{"tensors": entries, "sums": dict.fromkeys(entries, 1)}, finished, {"redo": shard.file}])
        )
    texts = [json.dumps(_changed(rng, line)).encode() for line in lines]
    return _damaged(rng, b"".join(map(signed, texts)))


def ledger(rng: Random) -> bytes:
    target = {"branch": "main", "create_pr": False}
    lines: list[Any] = [{"endpoint": "http://hub", "repository": "a/b", "target": target, "head": None}]
    rest: list[Any] = [{"file": "a", "bytes": 1, "sha256": "0"}, {"lost": "a"}, {"committing": True}]
    lines += [rng.choice(rest) for _ in range(rng.randrange(4))]
    return _damaged(rng, b"".join(signed(json.dumps(_changed(rng, line)).encode()) for line in lines))


def manifest(rng: Random) -> bytes:
    values = {
        "recipe": {"allow_nonfinite": False, "method": "ties"},
        "tensors": {"a": {"dtype": "F32", "shape": [1]}},
        "shards": {"model.safetensors": {"bytes": 1, "sha256": "0"}},
        "files": ["config.json", "model.safetensors", "docs/x.md"],
    }
    return _damaged(rng, json.dumps(_changed(rng, values)).encode())


GENERATORS: Mapping[str, Callable[[Random], bytes]] = {
    generator.__name__: generator for generator in (header, index, recipe, journal, ledger, manifest)
}


def _changed(rng: Random, value: Any) -> Any:
    """The structure with up to three faults."""
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        value = _with_fault(rng, value)
    return value


def _with_fault(rng: Random, value: Any) -> Any:
    """Go down to a random place: another value there, another key, one more, one less."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    kind = rng.random()
    if isinstance(value, list):
        place = rng.randrange(len(value))
        if kind < 0.2:
            return [*value, rng.choice(VALUES)]
        if kind < 0.3:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _with_fault(rng, value[place]), *value[place + 1 :]]
    key = rng.choice(list(value))
    if kind < 0.15:
        return {**value, str(rng.choice(VALUES)): rng.choice(VALUES)}
    if kind < 0.25:
        return {k: v for k, v in value.items() if k != key}
    if kind < 0.4:
        return {str(rng.choice(VALUES)) if k == key else k: v for k, v in value.items()}
    return {**value, key: _with_fault(rng, value[key])}


def _damaged(rng: Random, raw: bytes) -> bytes:
    """The bytes with up to three faults; often none, since most would end in the parser."""
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3])):
        at, kind = rng.randrange(len(raw) + 1), rng.randrange(5)
        upto = min(len(raw), at + 1 + rng.randrange(20))
        if kind == 0:
            raw = raw[:at] + rng.choice(TOKENS) + raw[at:]
        elif kind == 1:
            raw = raw[:at] + rng.choice(TOKENS) + raw[upto:]
        elif kind == 2:
            raw = raw[:at] + raw[upto:]
        elif kind == 3:
            raw = raw[:upto] + raw[at:]  # something twice
        else:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    return raw


def _as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(value).encode()
