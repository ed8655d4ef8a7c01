"""The writer: the library reads what it wrote, whatever the order, and a run given up leaves no trace."""

import hashlib
import json
import os
import random
import stat
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints.folders import content, top_level
from checkpoints.writing import FILES, IDENTITY, LIMIT, SHARDS_OF, STATE, fill, others, planned, raw, run, seeded
from safetensors.torch import load_file

from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint, torch_dtype
from streammerge.checkpoints.header import DTYPES
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.checkpoints.writer import CheckpointWriter

# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, LIMIT, 10**9])
def test_the_library_reads_what_was_written(out: Path, limit: int) -> None:
    run(out, limit=limit)
    found = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    assert found.keys() == STATE.keys()
    for name, value in STATE.items():
        assert (found[name].dtype, found[name].shape, raw(found[name])) == (value.dtype, value.shape, raw(value))
    with Checkpoint.open(out) as checkpoint:
        for name, value in STATE.items():
            assert raw(checkpoint.tensor(name)) == raw(value)


@pytest.mark.parametrize("name", [name for name, row in DTYPES.items() if row.torch_name])
def test_the_file_is_the_librarys_own_byte_for_byte(out: Path, name: str) -> None:
    dtype = torch_dtype(name)
    state = {key: torch.arange(n).to(torch.uint8).view(-1, 8) % 2 for key, n in (("a", 16), ("b", 0), ("é\n", 64))}
    state = {
        key: value.view(dtype) if value.numel() else torch.zeros(0, 3, dtype=dtype) for key, value in state.items()
    }
    run(out, state, 10**9)
    assert (out / SINGLE_FILE).read_bytes() == safetensors.torch.save(state, {"format": "pt"})


def test_the_header_follows_the_formats_rules(out: Path) -> None:
    run(out)
    for file, names in zip(FILES, SHARDS_OF, strict=True):
        data = (out / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + length]
        assert length % 8 == 0
        assert header.startswith(b"{")
        assert header.rstrip(b" ").endswith(b"}")
        entries = json.loads(header)
        assert entries.pop("__metadata__") == {"format": "pt"}
        assert sorted(entries) == names
        position = 0
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            assert start == position
            assert (8 + length + start) % STATE[name].element_size() == 0
            assert data[8 + length + start : 8 + length + stop] == raw(STATE[name])
            position = stop
        assert 8 + length + position == len(data)


def test_the_index(out: Path) -> None:
    run(out)
    index = json.loads((out / INDEX_FILE).read_text())
    assert index == {
        "metadata": {"total_size": sum(len(raw(value)) for value in STATE.values())},
        "weight_map": {name: file for file, names in zip(FILES, SHARDS_OF, strict=True) for name in names},
    }
    assert list(index["weight_map"]) == sorted(STATE)


def test_one_shard_has_no_index(out: Path) -> None:
    run(out, limit=10**9)
    assert top_level(out) == {SINGLE_FILE, MANIFEST_FILE, "config.json", "original"}


def test_other_files_are_written_verbatim(out: Path, tmp_path: Path) -> None:
    big = os.urandom(300_000)
    (tmp_path / "big").write_bytes(big)
    shards = planned(STATE)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        fill(writer, STATE)
        writer.publish({"x/y/z": tmp_path / "big", "e": b""})
    assert content(out)["x/y/z"] == big
    assert content(out)["e"] == b""
    assert (tmp_path / "big").read_bytes() == big


@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_any_thread_give_the_same_bytes(out: Path, expected: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    pieces = [(n, i) for n, value in STATE.items() for i in range(0, len(raw(value)), 16)]
    rng.shuffle(pieces)
    names = list(STATE)
    rng.shuffle(names)
    shards = planned(STATE)
    with CheckpointWriter(out, shards, IDENTITY) as writer, ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda p: writer.write(p[0], p[1], memoryview(raw(STATE[p[0]])[p[1] : p[1] + 16])), pieces)
        written = [*zip(pieces, sums, strict=True)]
        of = {name: [added for (piece_of, _), added in written if piece_of == name] for name in names}
        list(pool.map(lambda name: writer.complete(name, {}, of[name]), names))
        writer.publish(others(shards))
    assert content(out) == expected


@pytest.mark.parametrize("piece", [1, 100, 10**9])
def test_the_sha256_is_that_of_the_file(out: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    real_write, real_read = os.pwrite, os.pread  # short ones are legal for both
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:piece], offset))
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: real_read(fd, min(count, piece), offset))
    shards = planned(STATE)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        fill(writer, STATE)
        writer.publish(others(shards))
        assert set(writer.finished) == set(FILES)
        for file, names in zip(FILES, SHARDS_OF, strict=True):
            data = (out / file).read_bytes()
            assert writer.finished[file] == {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tensors": {name: {"numel": STATE[name].numel()} for name in names},
            }
    assert {n: raw(v) for file in FILES for n, v in load_file(out / file).items()} == {n: raw(STATE[n]) for n in STATE}


def test_a_tensor_larger_than_a_hash_piece(out: Path) -> None:
    state = {"big": seeded(700_000), "small": seeded(3)}
    run(out, state, 10**9)
    shards = planned(state, 10**9)
    with CheckpointWriter(out.parent / "again", shards, IDENTITY) as writer:
        fill(writer, state)
        assert writer.finished[SINGLE_FILE]["sha256"] == hashlib.sha256((out / SINGLE_FILE).read_bytes()).hexdigest()
    assert raw(load_file(out / SINGLE_FILE)["big"]) == raw(state["big"])


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], indirect=True)
def test_file_modes_honour_the_umask(out: Path, umask: int) -> None:
    run(out)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [out, *out.rglob("*")]}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


@pytest.mark.parametrize(("start", "count"), [(0, 201), (200, 1), (-1, 1), (-8, 4)])
def test_bytes_outside_the_tensor_are_refused(out: Path, start: int, count: int) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        with pytest.raises(ValueError, match="'b', which has 200"):
            writer.write("b", start, memoryview(bytes(count)))
        fill(writer, STATE)
        writer.publish({})
    assert raw(load_file(out / FILES[0])["b"]) == raw(STATE["b"])


def test_a_finished_shard_cannot_be_written_again(out: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE)
        for name in STATE:
            with pytest.raises(RuntimeError, match=f"tensor '{name}' is already complete"):
                writer.write(name, 0, memoryview(b""))
            with pytest.raises(RuntimeError, match=f"tensor '{name}' is already complete"):
                writer.complete(name, {}, [])
        writer.publish({})
    assert raw(load_file(out / FILES[1])["c"]) == raw(STATE["c"])


# --- leaving, and discarding ------------------------------------------------------------------------------------------


def test_leaving_the_context_ends_the_hashing_thread(out: Path, open_fds: set[int]) -> None:
    def hashers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("streammerge-hash")]

    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        for name in STATE:
            writer.complete(name, {}, [writer.write(name, 0, memoryview(raw(STATE[name])))])
        assert len(hashers()) == 1
    assert hashers() == []
    assert not open_fds


def test_discard_leaves_nothing_behind(out: Path, open_fds: set[int]) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE, SHARDS_OF[0] + ["c"])
        writer.write("z", 0, memoryview(b"x"))
        writer.discard()
    assert not out.exists()
    assert out.parent.exists()
    assert not open_fds


def test_discard_leaves_a_folder_that_was_there(out: Path) -> None:
    out.mkdir()
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        writer.discard()
    assert list(out.iterdir()) == []
