"""The header against the safetensors library, and everything malformed."""

import json
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streammerge.checkpoints.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    TensorInfo,
    encode_header,
    header_length,
    parse_header,
    tensor_nbytes,
)
from streammerge.checkpoints.source import LocalFile
from streammerge.errors import HeaderError

WHERE = "model m, file f.safetensors"


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def to_bytes(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def parse(content: bytes) -> dict[str, TensorInfo]:
    """Read a whole file's header as `Checkpoint` does."""
    length = header_length(content[:8], len(content), WHERE)
    return parse_header(content[8 : 8 + length], len(content), "f.safetensors", WHERE)


def library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The independent truth: what safetensors itself makes of the file."""
    return {k: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for k, v in safetensors.deserialize(content)}


def ours(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v.dtype, v.shape, content[v.start : v.stop]) for k, v in parse(content).items()}


# --- what the library writes and reads ---------------------------------------------------------------


def storable_dtypes() -> dict[str, torch.dtype]:
    """Every torch dtype the library can store, by the name it stores."""
    found = {}
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            with warnings.catch_warnings(action="ignore"):  # complex32 is experimental
                content = safetensors.torch.save({"x": torch.zeros(2, dtype=dtype)})
        except (KeyError, RuntimeError):
            continue
        found[parse(content)["x"].dtype] = dtype
    return found


STORABLE = storable_dtypes()


def test_the_dtype_table_is_what_torch_and_the_library_share() -> None:
    named = {name: getattr(torch, row.torch_name) for name, row in DTYPES.items() if row.torch_name}
    packed = {"F4": torch.float4_e2m1fn_x2}  # two numbers to an element: stored, never merged
    assert {**named, **packed} == STORABLE


@pytest.mark.parametrize("name", [name for name, row in DTYPES.items() if row.torch_name])
def test_the_dtype_table_agrees_with_torch(name: str) -> None:
    row, dtype = DTYPES[name], STORABLE[name]
    assert row.bits == 8 * dtype.itemsize
    assert row.floating == (dtype.is_floating_point and name != "F8_E8M0")  # E8M0 is a scale, not a weight


@pytest.mark.parametrize("name", DTYPES)
def test_the_library_knows_every_dtype_of_the_table(name: str) -> None:
    nbytes = DTYPES[name].bits  # of eight elements
    content = to_bytes({"x": entry(name, [8], [0, nbytes])}, bytes(range(nbytes)))
    assert library(content) == ours(content) == {"x": (name, (8,), bytes(range(nbytes)))}
    assert tensor_nbytes(name, (8,)) == nbytes


def test_a_file_of_the_library_is_read_in_byte_order() -> None:
    tensors = {"b": torch.ones(2, 3), "a": torch.zeros(2, dtype=torch.bfloat16), "é": torch.tensor(7)}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    assert ours(content) == library(content)
    infos = list(parse(content).values())
    assert [info.name for info in infos] == ["é", "b", "a"]
    assert [(info.nbytes, info.numel, info.floating) for info in infos] == [(8, 1, False), (24, 6, True), (4, 2, True)]
    assert {info.file for info in infos} == {"f.safetensors"}


def test_entries_in_any_order_come_out_in_byte_order() -> None:
    header = {"last": entry(offsets=[4, 8]), "empty": entry(shape=[0, 3], offsets=[4, 4]), "first": entry()}
    content = to_bytes(header, bytes(8))
    assert list(parse(content)) == ["first", "empty", "last"]
    assert ours(content) == library(content)


@pytest.mark.parametrize("raw", [b"{}", b'{"__metadata__":{}}', b"{}      "])
def test_a_file_without_tensors(raw: bytes) -> None:
    assert parse(to_bytes(raw)) == {}
    assert library(to_bytes(raw)) == {}


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors one behind the other from byte 0 on."""
    infos: list[TensorInfo] = []
    position = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        assume(bits % 8 == 0)
        infos.append(TensorInfo(name, dtype, shape, "f.safetensors", position, position + bits // 8))
        position += bits // 8
    return infos


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(0, 10**12))
def test_encode_then_parse_is_the_identity(infos: list[TensorInfo], data_start: int) -> None:
    shifted = [TensorInfo(t.name, t.dtype, t.shape, t.file, t.start + data_start, t.stop + data_start) for t in infos]
    header = encode_header(shifted, data_start)
    assert header == encode_header(infos)
    assert len(header) % 8 == 0
    assert header[8:9] == b"{"
    assert header.rstrip(b" ").endswith(b"}")
    assert len(header) == 8 + struct.unpack("<Q", header[:8])[0]

    data = bytes(i % 251 for i in range(infos[-1].stop if infos else 0))
    expected = {t.name: (t.dtype, t.shape, data[t.start : t.stop]) for t in infos}
    assert ours(header + data) == expected
    assert library(header + data) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_a_mutated_file_is_refused_or_valid_for_the_library_too(edits: list[tuple[int, int]], anywhere: bool) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    content = bytearray(safetensors.torch.save(tensors, {"format": "pt"}))
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for position, value in edits:
        content[position % length] = value if anywhere else b'0123456789,[]{}":- '[value % 19]
    try:
        found = ours(bytes(content))
    except HeaderError as error:
        assert str(error).startswith(WHERE)  # any other exception fails the test
        return
    if b"-0" not in content:  # an integer to Python, a float to the library
        assert library(bytes(content)) == found


# --- malformed ---------------------------------------------------------------------------------------

ONE = entry()
MALFORMED = {  # id: (header, data, words of the message, whether the library refuses it as well)
    "not UTF-8": (b'{"\xff": 1}', b"", ["not valid JSON", "utf-8"], True),
    "not JSON": (b"{'a': 1}", b"", ["not valid JSON"], True),
    "empty": (b"", b"", ["not a JSON object"], True),
    "BOM": (b"\xef\xbb\xbf{}", b"", ["not a JSON object"], True),
    "NUL padding": (b"{}\0\0", b"", ["not valid JSON"], True),
    "integer of 5000 digits": (b'{"a":' + b"1" * 5000 + b"}", b"", ["'a'", "an entry needs"], True),
    "deep nesting": (b'{"a":' * 100_000, b"", ["'a'", "an entry needs"], True),
    "deep nesting in a shape": (b'{"a":{"shape":' + b"[" * 100_000, b"", ["'a'", "an entry needs"], True),
    "list": ([], b"", ["not a JSON object"], True),
    "text": (b'"a"', b"", ["not a JSON object"], True),
    "null": (b"null", b"", ["not a JSON object"], True),
    "duplicate name": (b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), b"abcd", ["duplicate", "'a'"], False),
    "duplicate key in an entry": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", ["duplicate", "'dtype'"], True),
    "lone surrogate": ({"\ud800": ONE}, b"abcd", ["'\\ud800'", "not valid Unicode"], True),
    "metadata list": ({"__metadata__": []}, b"", ["__metadata__"], True),
    "metadata number": ({"__metadata__": {"format": 1}}, b"", ["__metadata__"], True),
    "metadata null": ({"__metadata__": None}, b"", ["__metadata__"], False),
    "entry null": ({"a": None}, b"", ["'a'", "an entry needs"], True),
    "entry list": ({"a": ["F32", [1], [0, 4]]}, b"abcd", ["'a'", "an entry needs"], False),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"abcd", ["'a'", "an entry needs"], True),
    "entry with more": ({"a": entry(strides=[1])}, b"abcd", ["'a'", "an entry needs"], False),
    "unknown dtype": ({"a": entry("F5")}, b"abcd", ["'a'", "unknown dtype 'F5'"], True),
    "dtype null": ({"a": entry(None)}, b"abcd", ["'a'", "unknown dtype None"], True),
    "dtype list": ({"a": entry(["F32"])}, b"abcd", ["'a'", "unknown dtype"], True),
    "shape text": ({"a": entry(shape="1")}, b"abcd", ["'a'", "bad shape"], True),
    "shape null": ({"a": entry(shape=None)}, b"abcd", ["'a'", "bad shape"], True),
    "shape negative": ({"a": entry(shape=[-1, -1])}, b"abcd", ["'a'", "bad shape"], True),
    "shape bool": ({"a": entry(shape=[True])}, b"abcd", ["'a'", "bad shape"], True),
    "shape float": ({"a": entry(shape=[1.0])}, b"abcd", ["'a'", "bad shape"], True),
    "shape NaN": ({"a": entry(shape=[float("nan")])}, b"abcd", ["'a'", "bad shape"], True),
    "shape nested": ({"a": entry(shape=[[1]])}, b"abcd", ["'a'", "bad shape"], True),
    "size huge": ({"a": entry(shape=[2**64])}, b"abcd", ["'a'", "bad shape"], True),
    "product huge": ({"a": entry(shape=[2**32, 2**32])}, b"", ["'a'", "bad shape"], True),
    "product huge, then zero": ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"", ["'a'", "bad shape"], True),
    "product of 300,000 digits": ({"a": entry(shape=[2**62] * 16_000)}, b"", ["'a'", "an entry needs"], True),
    "product of 1,200 digits": ({"a": entry(shape=[2**62] * 64)}, b"", ["'a'", "bad shape"], True),
    "65 dimensions": ({"a": entry(shape=[1] * 65)}, b"abcd", ["'a'", "65 dimensions, 64 is the most"], False),
    "shape Infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', b"", ["bad shape"], True),
    "shape 1e400": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', b"", ["bad shape"], True),
    "name of 1001 characters": ({"a" * 1001: ONE}, b"abcd", ["a name of 1001 characters"], False),
    "name unclosed": (b'{"a', b"", ["not valid JSON (character 1)"], True),
    "name with a bare line end": (b'{"a\n":1}', b"", ["not valid JSON (character 1)"], True),
    "no colon": (b'{"a" 1}', b"", ["not valid JSON (character 4)"], True),
    "comma at the end": (b'{"a":%b,}' % json.dumps(ONE).encode(), b"abcd", ["not valid JSON"], True),
    "two objects": (b"{}{}", b"", ["not valid JSON (character 2)"], True),
    "metadata of a MB": ({"__metadata__": {"a": "b" * 1_000_000}}, b"", ["__metadata__", "at most 1000000"], False),
    "metadata nested": ({"__metadata__": {"a": {}}}, b"", ["__metadata__"], True),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", ["duplicate name '__metadata__'"], True),
    "duplicate key in the metadata": (b'{"__metadata__":{"a":"","a":""}}', b"", ["duplicate name 'a'"], False),
    "shape and offsets disagree": ({"a": entry(shape=[2])}, b"abcd", ["'a'", "[2]", "does not fit its 4 bytes"], True),
    "packed dtype in half a byte": ({"a": entry("F4", [1], [0, 1])}, b"a", ["'a'", "does not fit its 1 bytes"], True),
    "offsets null": ({"a": entry(offsets=None)}, b"abcd", ["'a'", "bad data_offsets"], True),
    "offsets three": ({"a": entry(offsets=[0, 4, 8])}, b"abcd", ["'a'", "bad data_offsets"], True),
    "offsets backwards": ({"a": entry(offsets=[4, 0])}, b"abcd", ["'a'", "bad data_offsets"], True),
    "offsets negative": ({"a": entry(offsets=[-4, 0])}, b"abcd", ["'a'", "bad data_offsets"], True),
    "offsets bool": ({"a": entry("U8", [1], [False, True])}, b"a", ["'a'", "bad data_offsets"], True),
    "offsets huge": ({"a": entry(offsets=[2**70, 2**70 + 4])}, b"abcd", ["'a'", "bad data_offsets"], True),
    "overlap, equal": ({"a": ONE, "b": ONE}, b"abcd", ["'b'", "overlaps the tensor before it"], True),
    "overlap, partial": (
        {"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])},
        bytes(8),
        ["'b'", "overlaps the tensor before it"],
        True,
    ),
    "overlap, empty inside": (
        {"a": ONE, "b": entry(shape=[0], offsets=[2, 2])},
        b"abcd",
        ["'b'", "overlaps the tensor before it"],
        True,
    ),
    "gap": ({"a": ONE, "b": entry(offsets=[8, 12])}, bytes(12), ["'b'", "leaves a gap before it"], True),
    "gap at the start": ({"a": entry(offsets=[4, 8])}, bytes(8), ["'a'", "leaves a gap before it"], True),
    "out of the file": ({"a": ONE}, b"abc", ["'a'", "truncated or corrupt", "download the file again"], True),
    "far out of the file": (
        {"a": entry(shape=[2**60], offsets=[0, 2**62])},
        b"abc",
        ["'a'", "truncated or corrupt"],
        True,
    ),
    "trailing bytes": ({"a": ONE}, b"abcde", ["the tensors end at byte", "the file at"], True),
    "bytes without tensors": ({}, b"a", ["the tensors end at byte", "the file at"], True),
}


@pytest.mark.parametrize(("header", "data", "words", "library_refuses"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_refused(header: Any, data: bytes, words: list[str], library_refuses: bool) -> None:
    content = to_bytes(header, data)
    with pytest.raises(HeaderError) as caught:
        parse(content)
    assert all(word in str(caught.value) for word in [WHERE, *words]), str(caught.value)
    assert len(str(caught.value)) < 400
    if library_refuses:
        with pytest.raises(safetensors.SafetensorError):
            library(content)
    else:  # we are stricter on purpose
        library(content)


@pytest.mark.parametrize("depth", range(900, 1010, 2))
def test_nesting_near_the_interpreters_limit_is_refused(depth: int) -> None:
    raw = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":%b%b}}' % (b"[" * depth, b"]" * depth)
    with pytest.raises(HeaderError, match=WHERE):
        parse(to_bytes(raw))


@pytest.mark.parametrize("content", [b"", b"\0", bytes(7)])
def test_a_file_shorter_than_eight_bytes(content: bytes) -> None:
    with pytest.raises(HeaderError, match=f"{WHERE}: truncated: {len(content)} bytes"):
        parse(content)


@pytest.mark.parametrize("missing", [1, 20])
def test_a_header_longer_than_the_file(missing: int) -> None:
    content = to_bytes({"a": ONE})
    with pytest.raises(
        HeaderError, match=f"{WHERE}: truncated: the header ends at byte {len(content)}, .* {len(content) - missing}"
    ):
        parse(content[:-missing])


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused_whatever_the_file_size(length: int) -> None:
    with pytest.raises(HeaderError, match=f"{WHERE}: not a safetensors file: it announces a header of {length} bytes"):
        header_length(struct.pack("<Q", length), 2**65, WHERE)


def test_the_largest_header_allowed() -> None:
    prefix = struct.pack("<Q", MAX_HEADER_BYTES)
    assert header_length(prefix, MAX_HEADER_BYTES + 8, WHERE) == MAX_HEADER_BYTES


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (1,)), ("F6_E2M3", (2,)), ("F6_E3M2", (3, 1))])
def test_tensor_nbytes_refuses_half_bytes(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(HeaderError, match=f"{dtype} .* does not fill whole bytes"):
        tensor_nbytes(dtype, shape)


def test_the_number_of_tensors_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    content = to_bytes({f"t{number}": entry(shape=[0], offsets=[0, 0]) for number in range(6)})
    monkeypatch.setattr("streammerge.checkpoints.header.MAX_TENSORS", 6)
    assert len(parse(content)) == 6
    monkeypatch.setattr("streammerge.checkpoints.header.MAX_TENSORS", 5)
    with pytest.raises(HeaderError, match="more than 5 tensors in one file"):
        parse(content)


HOSTILE = {  # headers of which a parser makes 20 to 100 bytes of objects per byte
    "lists": b'{"a":{"shape":[' + b"[]," * 700_000 + b"1]}}",
    "lists in place of an entry": b'{"a":[' + b"[]," * 700_000 + b"1]}",
    "objects in an entry": b'{"a":{"shape":[' + b"{}," * 700_000 + b"1]}}",
    "keys": b'{"a":{' + b",".join(b'"%x":0' % number for number in range(200_000)) + b"}}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%x":""' % number for number in range(200_000)) + b"}}",
    "numbers": b'{"a":{"shape":[' + b"9999," * 400_000 + b"1]}}",
    "nested": b'{"a":' * 400_000,
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_takes_little_more_than_its_length(raw: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            parse_header(raw, 8 + len(raw), "f", WHERE)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
    finally:
        tracemalloc.stop()


def test_a_large_header_takes_ten_times_its_length_at_most() -> None:
    raw = json.dumps({f"{number:x}": entry(shape=[0], offsets=[0, 0]) for number in range(20_000)}).encode()
    tracemalloc.start()
    try:
        assert len(parse_header(raw, 8 + len(raw), "f", WHERE)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 10 * len(raw)
    finally:
        tracemalloc.stop()


def test_a_declared_length_reserves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match="truncated"):
            LocalFile(path, WHERE).header()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
