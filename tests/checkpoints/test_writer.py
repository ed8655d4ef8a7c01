"""The writer: the library reads what it wrote, nothing half-done loads, and an interruption leaves no trace."""

import errno
import hashlib
import json
import os
import random
import shutil
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE, Checkpoint, torch_dtype
from streammerge.checkpoints.header import DTYPES
from streammerge.checkpoints.layout import Shard, plan_shards
from streammerge.checkpoints.output import WORK_DIR, check_output
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import CheckpointError, HeaderError, OutputExistsError, StreammergeError, TransferError

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
            writer.write(name, 0, memoryview(raw(state[name])))
            writer.complete(name, {"numel": state[name].numel()})
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


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def top_level(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The folder of an uninterrupted run."""
    run(tmp_path / "expected")
    return content(tmp_path / "expected")


# --- layout ------------------------------------------------------------------------------------------


def test_one_shard_is_model_safetensors() -> None:
    (shard,) = planned(STATE, 10**9)
    assert shard.file == SINGLE_FILE
    assert {info.name for info in shard.tensors} == STATE.keys()


def test_several_shards_have_five_digits_and_keep_the_order() -> None:
    shards = planned(STATE)
    assert [shard.file for shard in shards] == FILES
    assert [sorted(info.name for info in shard.tensors) for shard in shards] == SHARDS_OF
    assert {info.file for shard in shards for info in shard.tensors} == set(FILES)


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([8], 8, [[8]]),
        ([4, 100, 4], 8, [[4], [100], [4]]),
        ([100, 100], 8, [[100], [100]]),
        ([100, 1], 8, [[100], [1]]),
        ([1, 7, 1], 8, [[1, 7], [1]]),
        ([0, 8, 0], 8, [[0, 8, 0]]),
        ([3, 3, 3], 1, [[3], [3], [3]]),
    ],
)
def test_shards_hold_at_most_the_limit_or_one_tensor(sizes: list[int], limit: int, groups: list[list[int]]) -> None:
    shards = plan_shards(((str(i), "U8", (size,)) for i, size in enumerate(sizes)), limit)
    assert [[info.nbytes for info in sorted(shard.tensors, key=lambda t: int(t.name))] for shard in shards] == groups


def test_a_hundred_thousand_shards_are_numbered_throughout() -> None:
    shards = plan_shards(((str(i), "U8", (1,)) for i in range(1200)), 1)
    assert (shards[0].file, shards[-1].file) == ("model-00001-of-01200.safetensors", "model-01200-of-01200.safetensors")


def test_wider_dtypes_come_first_and_everything_is_aligned() -> None:
    order = ["U8", "F4", "F64", "BF16", "F32", "BOOL", "I64", "F16"]
    (shard,) = plan_shards([(name, name, (2, 3)) for name in order], 10**9)
    assert [info.name for info in shard.tensors] == ["F64", "I64", "F32", "BF16", "F16", "U8", "BOOL", "F4"]
    position = len(shard.header)
    for info in shard.tensors:
        assert info.start == position
        assert info.start % max(1, DTYPES[info.dtype].bits // 8) == 0
        position = info.stop
    assert shard.size == position


def test_a_packed_tensor_of_half_a_byte_cannot_be_planned() -> None:
    with pytest.raises(HeaderError, match="does not fill whole bytes"):
        plan_shards([("x", "F4", (3,))], 100)


# --- what is written ---------------------------------------------------------------------------------


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
        list(pool.map(lambda p: writer.write(p[0], p[1], memoryview(raw(STATE[p[0]])[p[1] : p[1] + 16])), pieces))
        list(pool.map(lambda name: writer.complete(name, {}), names))
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
                writer.complete(name, {})
        writer.publish({})
    assert raw(load_file(out / FILES[1])["c"]) == raw(STATE["c"])


# --- nothing half-done looks done --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_nothing_is_loadable_before_publish(out: Path, limit: int) -> None:
    shards = planned(STATE, limit)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        for name in STATE:
            fill(writer, STATE, [name])
            assert top_level(out) == {WORK_DIR}
            with pytest.raises(CheckpointError, match="no safetensors file"):
                Checkpoint.open(out)
        writer.publish(others(shards))
    assert WORK_DIR not in top_level(out)
    Checkpoint.open(out).close()


def test_publish_refuses_an_incomplete_run(out: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE, SHARDS_OF[0] + SHARDS_OF[2][:1])
        with pytest.raises(RuntimeError, match=f"{FILES[1]} is not complete"):
            writer.publish({})
    assert top_level(out) == {WORK_DIR}


@pytest.mark.parametrize(("limit", "last"), [(LIMIT, INDEX_FILE), (10**9, SINGLE_FILE)])
def test_what_makes_the_folder_loadable_is_moved_last(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, last: str
) -> None:
    real, moved = os.replace, []

    def record(source: Path, target: Path) -> None:
        moved.append(str(target.relative_to(out)))
        real(source, target)

    monkeypatch.setattr(os, "replace", record)
    run(out, limit=limit)
    assert moved[-2:] == [MANIFEST_FILE, last]
    assert sorted(moved) == sorted(content(out))


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_every_file_is_on_disk_before_it_moves_and_the_folder_after(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    real_replace = os.replace
    synced: list[int] = []  # inodes
    at_move: dict[int, list[int]] = {}

    def recording(real: Callable[[int], None]) -> Callable[[int], None]:
        return lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1]

    def replace(source: Path, target: Path) -> None:
        at_move[source.stat().st_ino] = [*synced]
        real_replace(source, target)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    monkeypatch.setattr(os, "replace", replace)
    run(out, limit=limit)
    assert at_move.keys() == {path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert all(inode in before for inode, before in at_move.items())
    last, one_but_last = at_move.popitem()[1], at_move.popitem()[1]
    assert out.stat().st_ino in last[len(one_but_last) :]  # the others have their names when the index gets its own
    assert synced[-1] == out.stat().st_ino
    assert len(synced) > len(last)


def test_leaving_the_context_ends_the_hashing_thread(out: Path, open_fds: set[int]) -> None:
    def hashers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("streammerge-hash")]

    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        for name in STATE:
            writer.write(name, 0, memoryview(raw(STATE[name])))
            writer.complete(name, {})
        assert len(hashers()) == 1
    assert hashers() == []
    assert not open_fds


# --- resume ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("done", range(3))
def test_finished_shards_stay_as_they_are(out: Path, expected: dict[str, bytes], done: int) -> None:
    names = [name for part in SHARDS_OF[:done] for name in part]
    begun = SHARDS_OF[done][-1:] if done != 1 else []
    first = interrupted(out, names + begun)
    assert set(first) == set(FILES[:done])
    inodes = [(out / WORK_DIR / file).stat().st_ino for file in FILES[:done]]
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        assert writer.finished == first
        assert sorted(writer.entries) == sorted(names + begun)
    assert resumed(out) == set(FILES[:done])
    assert content(out) == expected
    assert [(out / file).stat().st_ino for file in FILES[:done]] == inodes  # the very same files


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"seed": 1}, "seed (0 -> 1)"),
        (
            {"recipe": {"method": "ties"}, "seed": 2},
            "recipe.method (linear -> ties), recipe.t ([1, 2] -> none), seed (0 -> 2)",
        ),
        ({"new": None}, "new (none -> none)"),
    ],
)
def test_another_identity_is_refused(out: Path, open_fds: set[int], change: dict[str, Any], keys: str) -> None:
    interrupted(out, SHARDS_OF[0])
    with pytest.raises(OutputExistsError) as caught:
        CheckpointWriter(out, planned(STATE), {**IDENTITY, **change})
    assert f"differs in {keys}:" in str(caught.value)
    assert str(out) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert not open_fds
    assert resumed(out) == {FILES[0]}  # and left as it was


def test_another_layout_is_another_identity(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    with pytest.raises(OutputExistsError, match="differs in layout:"):
        CheckpointWriter(out, planned(STATE, LIMIT - 300), IDENTITY)


def test_fresh_forgets_an_unfinished_run(out: Path, expected: dict[str, bytes]) -> None:
    interrupted(out, SHARDS_OF[0])
    with CheckpointWriter(out, planned(OTHER), {"seed": 9}, fresh=True) as writer:
        assert writer.finished == {}
    with CheckpointWriter(out, planned(STATE), IDENTITY, fresh=True) as writer:
        assert writer.finished == {}
    assert resumed(out) == set()
    assert content(out) == expected


def damage_cut(out: Path) -> None:
    path = out / WORK_DIR / FILES[1]
    os.truncate(path, path.stat().st_size - 1)


def damage_flip(out: Path) -> None:
    with (out / WORK_DIR / FILES[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def damage_delete(out: Path) -> None:
    (out / WORK_DIR / FILES[1]).unlink()


def damage_journal(out: Path) -> None:
    journal = out / WORK_DIR / "journal"
    os.truncate(journal, journal.stat().st_size - 1)


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_delete, damage_journal])
def test_a_shard_that_cannot_be_trusted_is_done_again(
    out: Path, expected: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    assert set(interrupted(out, SHARDS_OF[0] + SHARDS_OF[1])) == set(FILES[:2])
    damage(out)
    assert resumed(out) == {FILES[0]}
    assert content(out) == expected


def test_a_journal_torn_in_its_first_line_starts_anew(out: Path, expected: dict[str, bytes]) -> None:
    """Nothing comes before the first line, which is on disk before anything else is."""
    interrupted(out, [])
    os.truncate(out / WORK_DIR / "journal", 20)
    assert resumed(out) == set()
    assert content(out) == expected


def test_what_no_journal_speaks_of_is_not_taken(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    os.truncate(out / WORK_DIR / "journal", 20)
    left = set(content(out)) - {f"{WORK_DIR}/journal"}
    with pytest.raises(OutputExistsError, match="damaged journal: start anew with --overwrite"):
        CheckpointWriter(out, planned(STATE), IDENTITY)
    assert left <= set(content(out))


# --- discard -----------------------------------------------------------------------------------------


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


# --- check_output ------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_free(out: Path) -> None:
    check_output(out, [out.parent / "base"], overwrite=False)
    out.mkdir()
    check_output(out, [out.parent / "base"], overwrite=False)
    check_output(out, [], overwrite=True)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_an_output(out: Path, overwrite: bool) -> None:
    run(out)
    (out.parent / "link").symlink_to(out)
    for name in (out, out.parent / "link", out / ".." / "out"):
        with pytest.raises(OutputExistsError, match="is also an input"):
            check_output(name, [out.parent / "base", out], overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_output_folder(out: Path, overwrite: bool) -> None:
    out.write_text("x")
    with pytest.raises(OutputExistsError, match="out is a file"):
        check_output(out, [], overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_refused(out: Path, overwrite: bool) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"is not empty \('notes\.txt'\): .* or empty it"):
        check_output(out, [], overwrite)


def test_a_finished_merge_needs_overwrite(out: Path) -> None:
    run(out)
    with pytest.raises(OutputExistsError, match="or replace that merge with --overwrite"):
        check_output(out, [], overwrite=False)
    check_output(out, [], overwrite=True)


def test_an_unfinished_run_may_go_on(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    check_output(out, [], overwrite=False)
    check_output(out, [], overwrite=True)


def test_a_foreign_file_beside_ours_is_kept(out: Path) -> None:
    run(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"also holds 'notes\.txt', which is not ours to remove"):
        check_output(out, [], overwrite=True)


@pytest.mark.parametrize("files", [["../victim"], ["/victim"], ["x/../../victim"], [""], [7], 7, None])
def test_a_hostile_manifest_removes_nothing(out: Path, files: Any) -> None:
    run(out)
    victim = out.parent / "victim"
    victim.write_text("precious")
    if files == ["/victim"]:
        files = [str(victim)]
    (out / MANIFEST_FILE).write_text(json.dumps({"files": files}))
    with pytest.raises(OutputExistsError, match="is not empty"):
        check_output(out, [], overwrite=True)
    shards = planned(OTHER)
    with CheckpointWriter(out, shards, IDENTITY, fresh=True) as writer:  # as if nobody had checked
        fill(writer, OTHER)
        writer.publish(others(shards))
    assert victim.read_text() == "precious"


# --- overwrite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, LIMIT, 10**9])
def test_overwriting_leaves_nothing_of_the_old(out: Path, expected: dict[str, bytes], limit: int) -> None:
    run(out, OTHER, limit)
    run(out, fresh=True)
    assert content(out) == expected


@pytest.mark.parametrize(("limit", "first"), [(LIMIT, INDEX_FILE), (10**9, SINGLE_FILE)])
def test_what_makes_the_old_loadable_is_removed_first(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, first: str
) -> None:
    run(out, OTHER, limit)
    old = set(content(out))
    real, removed = os.unlink, []

    def record(path: Path) -> None:
        if path.parent != out / WORK_DIR:
            removed.append(str(path.relative_to(out)))
        real(path)

    monkeypatch.setattr(os, "unlink", record)
    run(out, fresh=True)
    assert removed[0] == first
    assert removed[-1] == MANIFEST_FILE
    assert set(removed) == old


def test_overwriting_leaves_the_old_alone_until_publish(out: Path) -> None:
    run(out, OTHER)
    before = content(out)
    with CheckpointWriter(out, planned(STATE), IDENTITY, fresh=True) as writer:
        fill(writer, STATE)
        assert {name: data for name, data in content(out).items() if not name.startswith(WORK_DIR)} == before
        writer.discard()
    assert content(out) == before


# --- killed while publishing -------------------------------------------------------------------------


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


@pytest.mark.parametrize(("limit", "call"), [(LIMIT, k) for k in range(7)] + [(10**9, k) for k in range(4)])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, os.strerror(errno.EIO))])
def test_killed_at_any_move_then_run_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, call: int, error: BaseException
) -> None:
    run(out.parent / "whole", limit=limit)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", call, error)
        with pytest.raises((Killed, TransferError), match=None if isinstance(error, Killed) else "moving the finished"):
            run(out, limit=limit)
    assert loads(out) is None
    assert WORK_DIR in top_level(out)
    shards = planned(STATE, limit)
    with CheckpointWriter(out, shards, IDENTITY) as writer:
        assert set(writer.finished) == {shard.file for shard in shards}  # nothing is computed twice
    run(out, limit=limit)
    assert content(out) == content(out.parent / "whole")


def test_there_is_no_move_beyond_those_killed_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, moves in ((LIMIT, 7), (10**9, 4)):
        with monkeypatch.context() as patch:
            kill_at(patch, os, "replace", moves, Killed())
            run(tmp_path / f"out{limit}", limit=limit)


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_killed_before_the_work_folder_is_removed(out: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    run(out.parent / "whole", limit=limit)
    with monkeypatch.context() as patch:
        kill_at(patch, os, "rmdir", 0, Killed())
        with pytest.raises(Killed):
            run(out, limit=limit)
    assert loads(out) == bits(STATE)
    run(out, limit=limit)
    assert content(out) == content(out.parent / "whole")


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_killed_again_at_any_move_after_all_had_moved(out: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The next run moves the other files once more: until then nothing loads without them."""
    run(out.parent / "whole", limit=limit)
    whole = content(out.parent / "whole")
    for call in range(5):
        with monkeypatch.context() as patch:
            kill_at(patch, disk, "remove_tree", 0, Killed())
            with pytest.raises(Killed):
                run(out, limit=limit)
        with monkeypatch.context() as patch:
            kill_at(patch, os, "replace", call, Killed())
            with suppress(Killed):
                run(out, limit=limit)
        seen = {name: data for name, data in content(out).items() if not name.startswith(WORK_DIR)}
        assert loads(out) is None or seen == whole
        if (out / WORK_DIR).exists():  # there are not so many moves
            run(out, limit=limit)
        assert content(out) == whole
        shutil.rmtree(out)


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
@pytest.mark.parametrize(
    ("name", "call"), [*(("unlink", k) for k in range(5)), *(("replace", k) for k in range(4)), ("rmdir", 0)]
)
@pytest.mark.parametrize("fresh", [False, True])
def test_killed_while_replacing_an_older_merge(
    out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, name: str, call: int, fresh: bool
) -> None:
    run(out.parent / "whole", limit=limit, seed=1)
    run(out, OTHER)
    with monkeypatch.context() as patch:
        kill_at(patch, os, name, call, Killed())
        with pytest.raises(Killed):
            run(out, limit=limit, fresh=True, seed=1)
    assert loads(out) in (None, bits(OTHER), bits(STATE))  # never a mixture
    run(out, limit=limit, fresh=fresh, seed=1)
    assert loads(out) == bits(STATE)
    assert content(out) == content(out.parent / "whole")


# --- disks that fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("posix_fallocate", f"{FILES[0]}: cannot reserve"),
        ("pwrite", f"{FILES[0]}: writing at byte 0"),
        ("pread", f"{FILES[0]}: reading back at byte"),
        ("fsync", f"{FILES[0]}: cannot be made durable"),
        ("fdatasync", f"{FILES[0]}: cannot be made durable"),
    ],
)
def test_a_failing_disk_is_a_transfer_error(
    out: Path,
    expected: dict[str, bytes],
    open_fds: set[int],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    call: str,
    words: str,
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        patch.setattr(os, call, fail)
        with pytest.raises(TransferError) as caught:
            fill(writer, STATE)
    assert words in str(caught.value)
    assert str(caught.value).endswith(os.strerror(code))
    assert not open_fds
    assert resumed(out) == set() or call == "pread"  # what could not be read back was written
    assert content(out) == expected


def test_a_full_disk_names_the_space_it_needs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, os, "posix_fallocate", 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    size = planned(STATE)[0].size
    with (
        CheckpointWriter(out, planned(STATE), IDENTITY) as writer,
        pytest.raises(TransferError, match=f"cannot reserve {size} B: {os.strerror(errno.ENOSPC)}"),
    ):
        fill(writer, STATE)


def test_the_journal_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        kill_at(monkeypatch, os, "write", 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(TransferError, match="cannot be made durable"):
            fill(writer, STATE)


def test_a_shard_cut_behind_our_back_while_it_is_hashed(out: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        writer.write("c", 0, memoryview(raw(STATE["c"])))
        os.truncate(out / WORK_DIR / FILES[1], 500)
        writer.complete("c", {})
        with pytest.raises(TransferError, match=f"{FILES[1]}: ended at byte 500"):
            writer.wait()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransferError, match=r"cannot be prepared: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "out", planned(STATE), IDENTITY)


def test_a_side_file_that_vanished(out: Path, tmp_path: Path) -> None:
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE)
        with pytest.raises(TransferError, match=r"tokenizer\.json: cannot be copied from .*gone"):
            writer.publish({"tokenizer.json": tmp_path / "gone"})
    assert loads(out) is None


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_disk_that_cannot_reserve_is_written_all_the_same(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        fill(writer, STATE)
        writer.publish({"config.json": b"{}"})
    assert loads(out) == bits(STATE)
