"""Checkpoint folders against the safetensors library, and every way a folder can be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix, require_finite, torch_dtype
from streammerge.checkpoints.header import DTYPES, TensorInfo
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.errors import CheckpointError, HeaderError, MissingTensorError, TransferError

Make = Callable[..., Path]
Tiny = Callable[..., bytes]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, NaN payloads included."""
    numel = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, numel * dtype.itemsize, dtype=np.uint8)
    if dtype is torch.bool:
        raw &= 1
    values = torch.empty(shape, dtype=dtype)
    values.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return values


def raw_bytes(values: torch.Tensor) -> bytes:
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()


STATE = {
    "model.embed_tokens.weight": random_bits(torch.bfloat16, (50, 8)),
    **{f"model.layers.{i}.mlp.weight": random_bits(torch.float32, (16, 8), i) for i in range(4)},
    "model.norm.weight": random_bits(torch.float16, (8,)),
    "counter": torch.tensor(41),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder as transformers writes it, in several shards."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_torch_state_dict(STATE, folder, max_shard_size=1_000)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


# --- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in DTYPES.items() if row.torch_name])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 3)])
def test_every_dtype_is_read_bit_for_bit(make_model: Make, name: str, shape: tuple[int, ...]) -> None:
    expected = random_bits(torch_dtype(name), shape)
    folder = make_model({})
    save_file({"x": expected, "other": torch.ones(3)}, folder / SINGLE_FILE)
    with Checkpoint.open(folder) as checkpoint:
        found = checkpoint.tensor("x")
        assert checkpoint.info("x").dtype == name
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert raw_bytes(found) == raw_bytes(expected)


def test_a_dtype_torch_has_not() -> None:
    with pytest.raises(CheckpointError, match="has no dtype for F4"):
        torch_dtype("F4")


def test_a_sharded_folder_is_read_like_the_library_does(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    expected = {name: (value, file) for file in files for name, value in load_file(sharded / file).items()}
    with Checkpoint.open(sharded, id="org/name", revision="abc") as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys() == STATE.keys()
        for name, (value, file) in expected.items():
            assert checkpoint.info(name).file == file
            assert raw_bytes(checkpoint.tensor(name)) == raw_bytes(value) == raw_bytes(STATE[name])
        assert [info.file for info in checkpoint.tensors.values()] == sorted(
            info.file for info in checkpoint.tensors.values()
        )
        assert (checkpoint.id, checkpoint.revision, checkpoint.folder) == ("org/name", "abc", sharded)
        assert checkpoint.config == {"model_type": "tiny"}


def test_any_byte_range_of_a_tensor(sharded: Path) -> None:
    rng = np.random.default_rng(1)
    with Checkpoint.open(sharded) as checkpoint:
        for name, value in STATE.items():
            whole = np.frombuffer(raw_bytes(value), np.uint8)
            for _ in range(20):
                start, stop = sorted(rng.integers(0, len(whole) + 1, 2))
                buffer = bytearray(b"\xaa" * (stop - start))
                checkpoint.read_into(checkpoint.info(name), int(start), memoryview(buffer))
                np.testing.assert_array_equal(np.frombuffer(buffer, np.uint8), whole[start:stop])


@pytest.mark.parametrize(("start", "count"), [(0, 17), (16, 1), (-1, 4), (-4, 4), (17, 0)])
def test_a_range_outside_the_tensor_is_refused(make_model: Make, start: int, count: int) -> None:
    folder = make_model({})
    save_file({"a": torch.ones(4), "x": torch.ones(4), "z": torch.ones(4)}, folder / SINGLE_FILE)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(ValueError, match="'x', which has 16"):
        checkpoint.read_into(checkpoint.info("x"), start, memoryview(bytearray(count)))


def test_a_missing_tensor(make_model: Make, tiny: Tiny) -> None:
    with Checkpoint.open(make_model({SINGLE_FILE: tiny("a")}), id="org/m") as checkpoint:
        with pytest.raises(MissingTensorError) as caught:
            checkpoint.tensor("b")
        assert str(caught.value) == "model org/m: there is no tensor 'b'"


def test_files_are_closed(sharded: Path, open_fds: set[int]) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert len(open_fds) > 2
    assert not open_fds
    with pytest.raises(TransferError):
        checkpoint.tensor("counter")


@pytest.mark.parametrize("name", ["weights.safetensors", SINGLE_FILE, "model-00001-of-00001.safetensors"])
def test_one_file_needs_no_index(make_model: Make, tiny: Tiny, name: str) -> None:
    with Checkpoint.open(make_model({name: tiny("a", "b")})) as checkpoint:
        assert {info.file for info in checkpoint.tensors.values()} == {name}
        assert checkpoint.tensor("b").tolist() == [1.0]


def test_an_index_may_name_model_safetensors_and_subfolders(make_model: Make, tiny: Tiny) -> None:
    index = {"weight_map": {"a": SINGLE_FILE, "b": "more/b.safetensors"}}
    folder = make_model({SINGLE_FILE: tiny("a"), "more/b.safetensors": tiny("b"), INDEX_FILE: index})
    with Checkpoint.open(folder) as checkpoint:
        assert {name: info.file for name, info in checkpoint.tensors.items()} == index["weight_map"]


def test_linked_files_are_read_as_in_the_hub_cache(make_model: Make, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(tiny("a"))
    folder = make_model({})
    (folder / SINGLE_FILE).symlink_to("../blob")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensor("a").tolist() == [0.0]
        assert list(checkpoint.side_files()) == ["config.json"]


def test_config_is_optional_where_the_caller_says_so(make_model: Make, tiny: Tiny) -> None:
    folder = make_model({SINGLE_FILE: tiny("a")})
    (folder / "config.json").unlink()
    with Checkpoint.open(folder, need_config=False) as checkpoint:
        assert checkpoint.config == {}
    with pytest.raises(CheckpointError, match=r"model org/m, file config\.json: missing"):
        Checkpoint.open(folder, id="org/m")


# --- malformed folders -------------------------------------------------------------------------------

TWO = {"a": "1.safetensors", "b": "2.safetensors"}
BAD_INDEXES: dict[str, tuple[Any, type[CheckpointError], list[str]]] = {
    "not JSON": (b"{", HeaderError, ["not valid JSON"]),
    "not UTF-8": (b'{"\xff": 1}', HeaderError, ["not valid JSON"]),
    "deep nesting": (b'{"weight_map":' * 100_000, HeaderError, ["not valid JSON"]),
    "not an object": (b"[]", HeaderError, ["not a JSON object"]),
    "no weight_map": ({"metadata": {}}, HeaderError, ["no weight_map"]),
    "weight_map empty": ({"weight_map": {}}, HeaderError, ["no weight_map"]),
    "weight_map list": ({"weight_map": ["a"]}, HeaderError, ["no weight_map"]),
    "weight_map null": ({"weight_map": None}, HeaderError, ["no weight_map"]),
    "file null": ({"weight_map": {**TWO, "b": None}}, HeaderError, ["'b'", "None", "no safetensors file"]),
    "file number": ({"weight_map": {**TWO, "b": 2}}, HeaderError, ["'b'", "2", "no safetensors file"]),
    "file list": ({"weight_map": {**TWO, "b": ["2.safetensors"]}}, HeaderError, ["'b'", "no safetensors file"]),
    "pickle": ({"weight_map": {**TWO, "b": "2.bin"}}, HeaderError, ["'b'", "'2.bin'", "no safetensors file"]),
    "above": ({"weight_map": {**TWO, "b": "../2.safetensors"}}, HeaderError, ["'b'", "outside the folder"]),
    "above and back": ({"weight_map": {**TWO, "b": "x/../../2.safetensors"}}, HeaderError, ["'b'", "leads out"]),
    "absolute": ({"weight_map": {**TWO, "b": "/2.safetensors"}}, HeaderError, ["'b'", "an absolute path"]),
    "backslash": ({"weight_map": {**TWO, "b": "..\\2.safetensors"}}, HeaderError, ["'b'", "outside the folder"]),
    "NUL": ({"weight_map": {**TWO, "b": "2\0.safetensors"}}, HeaderError, ["'b'", "cannot be printed"]),
    "missing file": ({"weight_map": {**TWO, "b": "3.safetensors"}}, HeaderError, ["3.safetensors", "missing"]),
    "long file": ({"weight_map": {**TWO, "b": "x" * 5000 + ".safetensors"}}, HeaderError, ["too long"]),
    "surrogate file": (
        {"weight_map": {**TWO, "b": "\ud800.safetensors"}},
        HeaderError,
        ["'\\ud800.safetensors'", "cannot be printed"],
    ),
    "a directory": ({"weight_map": {**TWO, "b": "dir.safetensors"}}, HeaderError, ["dir.safetensors", "missing"]),
    "tensor not in its file": (
        {"weight_map": {**TWO, "c": "2.safetensors"}},
        HeaderError,
        ["'c'", "2.safetensors", "does not hold it"],
    ),
    "tensor in the other file": (
        {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}},
        HeaderError,
        ["'a'", "2.safetensors", "does not hold it"],
    ),
    "one file under two names": ({"weight_map": {**TWO, "a2": "./1.safetensors"}}, HeaderError, ["'a2'", "no plain"]),
    "surrogate tensor": ({"weight_map": {**TWO, "\ud800": "2.safetensors"}}, HeaderError, ["not valid Unicode"]),
    "tensor of 1001 characters": ({"weight_map": {**TWO, "a" * 1001: "2.safetensors"}}, HeaderError, ["1000 is the"]),
    "Windows drive": ({"weight_map": {**TWO, "b": "C:2.safetensors"}}, HeaderError, ["'b'", "an absolute path"]),
    "backslash inside": ({"weight_map": {**TWO, "b": "x\\2.safetensors"}}, HeaderError, ["'b'", "a backslash"]),
    "nested": (
        b'{"weight_map":{"a":"1.safetensors"},"x":' + b"[" * 51 + b"]" * 51 + b"}",
        HeaderError,
        ["nested more"],
    ),
    "many values": (b'{"weight_map":{"a":[' + b"[]," * 2_000_001 + b"1]}}", HeaderError, ["more than 2000000 values"]),
    "huge": (b'{"weight_map":{"a":"1.safetensors"}}' + b" " * 64_000_000, HeaderError, ["larger than 64000000 bytes"]),
    "integer of 5000 digits": (b'{"weight_map":' + b"1" * 5000 + b"}", HeaderError, ["not valid JSON"]),
    "duplicate keys": (
        b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors","b":"2.safetensors"}}',
        HeaderError,
        ["duplicate name 'a'"],
    ),
}


@pytest.mark.parametrize(("index", "error", "words"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_bad_index_is_refused(
    make_model: Make, tiny: Tiny, open_fds: set[int], index: Any, error: type[CheckpointError], words: list[str]
) -> None:
    folder = make_model({"1.safetensors": tiny("a"), "2.safetensors": tiny("b"), INDEX_FILE: index})
    (folder / "dir.safetensors").mkdir()
    (folder.parent / "2.safetensors").write_bytes(tiny("b"))
    with pytest.raises(error) as caught:
        Checkpoint.open(folder, id="org/m")
    assert str(caught.value).startswith("model org/m, file ")
    assert INDEX_FILE in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not open_fds


def test_the_bad_indexes_are_one_step_from_a_good_one(make_model: Make, tiny: Tiny) -> None:
    files = {"1.safetensors": tiny("a"), "2.safetensors": tiny("b"), INDEX_FILE: {"weight_map": TWO}}
    with Checkpoint.open(make_model(files)) as checkpoint:
        assert {name: info.file for name, info in checkpoint.tensors.items()} == TWO


def test_a_tensor_the_index_lacks(make_model: Make, tiny: Tiny) -> None:
    folder = make_model(
        {"1.safetensors": tiny("a"), "2.safetensors": tiny("b", "extra"), INDEX_FILE: {"weight_map": TWO}}
    )
    with pytest.raises(HeaderError, match=r"model org/m, file 2\.safetensors: holds tensor 'extra', which .*index"):
        Checkpoint.open(folder, id="org/m")


def test_a_tensor_in_two_shards(make_model: Make, tiny: Tiny) -> None:
    folder = make_model({"1.safetensors": tiny("a"), "2.safetensors": tiny("b", "a"), INDEX_FILE: {"weight_map": TWO}})
    with pytest.raises(HeaderError, match=r"file 2\.safetensors: tensor 'a' is also in file 1\.safetensors"):
        Checkpoint.open(folder)


def test_a_stale_index_beside_a_single_file(make_model: Make, tiny: Tiny) -> None:
    files = {SINGLE_FILE: tiny("a"), "1.safetensors": tiny("a"), "2.safetensors": tiny("b")}
    folder = make_model({**files, INDEX_FILE: {"weight_map": TWO}})
    with pytest.raises(HeaderError, match=r"model org/m: both model\.safetensors and an index .* delete the one"):
        Checkpoint.open(folder, id="org/m")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no safetensors file"]),
        ({"1.safetensors": b"", "2.safetensors": b""}, [f"no {INDEX_FILE} beside 1.safetensors", "2 safetensors"]),
        ({"model-00001-of-00002.safetensors": b""}, [f"no {INDEX_FILE} beside model-00001", "incomplete"]),
        ({"model-00010-of-00010.safetensors": b""}, [f"no {INDEX_FILE} beside model-00010", "incomplete"]),
        ({"pytorch_model.bin": b"x"}, ["only pickled weights (pytorch_model.bin)", "save_pretrained"]),
        ({"a.pt": b"x", "pytorch_model.bin.index.json": {}}, ["only pickled weights (a.pt)", "save_pretrained"]),
    ],
)
def test_a_folder_without_usable_weights(make_model: Make, files: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(make_model(files), id="org/m")
    assert all(word in str(caught.value) for word in ["model org/m: ", *words]), str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model org/m: there is no folder .*none"):
        Checkpoint.open(tmp_path / "none", id="org/m")


def test_a_file_instead_of_a_folder(make_model: Make, tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        Checkpoint.open(make_model({SINGLE_FILE: tiny("a")}) / SINGLE_FILE)


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"a":1,"a":2}', b"\xff", b'{"a":' * 100_000])
def test_a_bad_config(make_model: Make, tiny: Tiny, open_fds: set[int], config: bytes) -> None:
    folder = make_model({SINGLE_FILE: tiny("a"), "config.json": config})
    with pytest.raises(HeaderError, match=r"^model org/m, file config\.json: (not|duplicate)"):
        Checkpoint.open(folder, id="org/m")
    assert not open_fds


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        ((10**6).to_bytes(8, "little"), "truncated: the header ends at byte 1000008, the file at 8"),
        ((10**8 + 1).to_bytes(8, "little"), "announces a header of 100000001 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    ],
)
def test_a_bad_file_is_named(make_model: Make, open_fds: set[int], content: bytes, words: str) -> None:
    folder = make_model({SINGLE_FILE: content})
    with pytest.raises(HeaderError) as caught:
        Checkpoint.open(folder, id="org/m")
    assert str(caught.value).startswith("model org/m, file model.safetensors: ")
    assert words in str(caught.value)
    assert not open_fds


def test_a_file_cut_at_any_byte_is_refused(make_model: Make, tiny: Tiny) -> None:
    whole = tiny("a", "b")
    folder = make_model({})
    for length in range(len(whole)):
        (folder / SINGLE_FILE).write_bytes(whole[:length])
        with pytest.raises(HeaderError, match=r"model\.safetensors: truncated"):
            Checkpoint.open(folder)


def test_files_without_any_tensor(make_model: Make, raw_file: Callable[..., bytes]) -> None:
    with pytest.raises(CheckpointError, match="model org/m: its safetensors files hold no tensor"):
        Checkpoint.open(make_model({SINGLE_FILE: raw_file({})}), id="org/m")


@pytest.mark.parametrize("kind", ["directory", "fifo"])
@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", INDEX_FILE])
def test_what_is_no_regular_file_is_refused(make_model: Make, tiny: Tiny, kind: str, name: str) -> None:
    folder = make_model({SINGLE_FILE: tiny("a")})
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if kind == "directory" else os.mkfifo(folder / name)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, id="org/m")
    assert str(caught.value).startswith(f"model org/m, file {name}: ")


def test_a_config_that_cannot_be_read(make_model: Make, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, count: int) -> bytes:
        raise OSError(5, "Input/output error")

    folder = make_model({SINGLE_FILE: tiny("a")})
    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(TransferError, match=r"model org/m, file config\.json: cannot be read: Input/output error"):
        Checkpoint.open(folder, id="org/m")


# --- fingerprint -------------------------------------------------------------------------------------


def fingerprint(folder: Path, state: dict[str, torch.Tensor], shard_size: int = 10**9) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_torch_state_dict(state, folder, max_shard_size=shard_size)
    with Checkpoint.open(folder, need_config=False) as checkpoint:
        return checkpoint.fingerprint()


def test_the_fingerprint_does_not_depend_on_shards(tmp_path: Path) -> None:
    prints = {size: fingerprint(tmp_path / "m", STATE, size) for size in (10**9, 1_000, 1)}
    assert len(set(prints.values())) == 1
    assert len(prints[1]) == 64


def changed(name: str) -> list[dict[str, torch.Tensor]]:
    """The state with one element of one tensor changed: the first, the middle, the last."""
    states = []
    for position in (0, STATE[name].numel() // 2, -1):
        value = STATE[name].clone()
        value.view(-1).view(torch.uint8).view(-1, value.element_size())[position] ^= 1
        states.append({**STATE, name: value})
    return states


@pytest.mark.parametrize("name", [name for name, value in STATE.items() if value.numel()])
def test_the_fingerprint_tells_a_changed_tensor(tmp_path: Path, name: str) -> None:
    prints = {fingerprint(tmp_path / "m", state) for state in [STATE, *changed(name)]}
    assert len(prints) == (2 if STATE[name].numel() == 1 else 4)


@pytest.mark.parametrize(
    "change",
    [
        {"empty": torch.zeros(3, 0)},
        {"empty": torch.zeros(0, 3, dtype=torch.float64)},
        {"model.norm.weight": STATE["model.norm.weight"].view(2, 4)},
        {"model.norm.weight": STATE["model.norm.weight"].view(torch.bfloat16)},
        {"one more": torch.zeros(0)},
    ],
)
def test_the_fingerprint_tells_names_dtypes_and_shapes(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    assert fingerprint(tmp_path / "m", {**STATE, **change}) != fingerprint(tmp_path / "m", STATE)


# --- side files --------------------------------------------------------------------------------------


def test_side_files(make_model: Make, tiny: Tiny) -> None:
    inside = [
        "LICENSE",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "configuration_x.py",
        "docs/README.md",
        "generation_config.json",
        "merges.txt",
        "original/params.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    outside = [
        *("README.md", "streammerge.json", ".gitattributes", ".cache/x.json", "sub/.hidden", ".streammerge/journal"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "original/consolidated.00.pth"),
        *("model.gguf", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "onnx/model.onnx_data", "a.ckpt"),
        *("rust_model.ot", "64.tflite", "coreml/model.mlmodel", "adapter/adapter_model.safetensors"),
    ]
    folder = make_model({SINGLE_FILE: tiny("a"), **dict.fromkeys([*inside, *outside], b"{}")})
    (folder / "broken").symlink_to("nowhere")
    (folder / "emptydir").mkdir()
    with Checkpoint.open(folder) as checkpoint:
        assert sorted(checkpoint.side_files()) == inside


# --- blocks ------------------------------------------------------------------------------------------


def infos(sizes: dict[str, int]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", (size,), "f", 0, 4 * size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        (
            "model.layers",
            {"model.layers.0.self_attn.q_proj.weight": 0, "model.layers.11.mlp.down_proj.weight": 11},
            ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
        ),
        (
            "model.layers",
            {"model.layers.3.mlp.experts.7.w1.weight": 3, "model.layers.3.mlp.gate.weight": 3},
            ["model.embed_tokens.weight"],
        ),
        (
            "transformer.h",
            {"transformer.h.0.attn.c_attn.weight": 0},
            ["transformer.wte.weight", "transformer.ln_f.bias"],
        ),
        ("h", {"h.2.ln_1.weight": 2}, ["wte.weight", "ln_f.weight"]),
        ("gpt_neox.layers", {"gpt_neox.layers.5.mlp.dense.bias": 5}, ["embed_out.weight"]),
        ("transformer.blocks", {"transformer.blocks.1.ffn.up_proj.weight": 1}, ["transformer.wte.weight"]),
        ("encoder.block", {"encoder.block.4.layer.0.SelfAttention.q.weight": 4}, ["shared.weight"]),
        ("bert.encoder.layer", {"bert.encoder.layer.9.output.dense.weight": 9}, ["bert.pooler.dense.weight"]),
        ("backbone.layers", {"backbone.layers.7.mixer.A_log": 7}, ["backbone.embeddings.weight"]),
    ],
)
def test_decoder_blocks(prefix: str, inside: dict[str, int], outside: list[str]) -> None:
    assert decoder_prefix(infos(dict.fromkeys([*inside, *outside], 8))) == prefix
    assert {name: block_index(name, prefix) for name in inside} == inside
    assert [block_index(name, prefix) for name in outside] == [None] * len(outside)


def test_the_larger_of_two_stacks_is_the_decoder() -> None:
    vision, language = "vision_tower.encoder.layers", "language_model.model.layers"
    names = [f"{vision}.{i}.fc.weight" for i in range(9)] + [f"{language}.{i}.fc.weight" for i in range(4)]
    sizes = {name: 100 if name.startswith(language) else 10 for name in names}
    assert decoder_prefix(infos(sizes)) == language
    assert block_index(f"{language}.3.fc.weight", language) == 3
    assert block_index(f"{vision}.3.fc.weight", language) is None


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.mylayers.0.x", "model.layers.x.weight", "layers.3", "h.0x.y"]
)
def test_a_model_without_blocks(name: str) -> None:
    assert decoder_prefix(infos({name: 8})) is None
    assert block_index(name, "model.layers") is None
    assert block_index(name, None) is None


# --- finite values -----------------------------------------------------------------------------------

INFO = TensorInfo("x", "F32", (4,), "f.safetensors", 0, 16)


@pytest.mark.parametrize(
    ("values", "bad"),
    [([0.0, float("nan")], 1), ([float("inf"), float("-inf"), float("nan")], 3), ([1.0, float("-inf"), 2.0], 1)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_values_are_counted(values: list[float], bad: int, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_finite(torch.tensor(values, dtype=dtype), INFO, "org/m")
    message = f"model org/m, file f.safetensors: tensor 'x' holds {bad} non-finite"
    assert str(caught.value).startswith(message)
    assert "--allow-nonfinite" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        torch.full((4,), torch.finfo(torch.float32).max),  # the sum overflows, the values do not
        torch.full((100,), 60_000.0, dtype=torch.float16),
        torch.zeros(0),
        torch.arange(4),
    ],
)
def test_finite_values_pass(values: torch.Tensor) -> None:
    require_finite(values, INFO, "org/m")


def test_a_json_index_of_the_library_has_what_we_need(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    with Checkpoint.open(sharded) as checkpoint:
        assert {name: info.file for name, info in checkpoint.tensors.items()} == index["weight_map"]
        assert sum(info.nbytes for info in checkpoint.tensors.values()) == index["metadata"]["total_size"]
