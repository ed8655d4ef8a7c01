"""The safetensors header: bytes <-> {name: TensorInfo}. Pure, without torch, trusting nothing.

Layout of a file: the header's length as an unsigned 64-bit little-endian integer, the header (a JSON
object), then the tensors' bytes without a gap. Each entry is `{"dtype", "shape", "data_offsets"}`, the
offsets counted from the end of the header.
Reference: https://github.com/huggingface/safetensors#format
"""

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from streammerge.checkpoints.header_text import entries
from streammerge.errors import HeaderError

# The format allows 100 MB. The largest published models have 150,000 tensors in all their files together, in less than
# 20 MB of headers. What is parsed takes about five times its header.
MAX_HEADER_BYTES = 64_000_000
MAX_TENSORS = 500_000  # in one file
MAX_DIMENSIONS = 64  # torch's limit


class DType(NamedTuple):
    """One row of the format's dtype table."""

    bits: int
    torch_name: str | None  # None: packed or unknown to torch; can be copied, never merged
    floating: bool


DTYPES: Mapping[str, DType] = {
    "BOOL": DType(8, "bool", False),
    "F4": DType(4, None, False),
    "F6_E2M3": DType(6, None, False),
    "F6_E3M2": DType(6, None, False),
    "U8": DType(8, "uint8", False),
    "I8": DType(8, "int8", False),
    "F8_E5M2": DType(8, "float8_e5m2", True),
    "F8_E4M3": DType(8, "float8_e4m3fn", True),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz", True),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz", True),
    "F8_E8M0": DType(8, "float8_e8m0fnu", False),
    "I16": DType(16, "int16", False),
    "U16": DType(16, "uint16", False),
    "F16": DType(16, "float16", True),
    "BF16": DType(16, "bfloat16", True),
    "I32": DType(32, "int32", False),
    "U32": DType(32, "uint32", False),
    "F32": DType(32, "float32", True),
    "I64": DType(64, "int64", False),
    "U64": DType(64, "uint64", False),
    "F64": DType(64, "float64", True),
    "C64": DType(64, "complex64", False),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    `start` and `stop` are absolute byte offsets in `file` (a name relative to the checkpoint's folder).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return DTYPES[self.dtype].floating


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises HeaderError where a packed dtype does not fill whole bytes."""
    bits = DTYPES[dtype].bits * math.prod(shape)
    if bits % 8:
        raise HeaderError(f"{dtype} x {list(shape)} does not fill whole bytes")
    return bits // 8


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Length of the JSON header, from the file's first 8 bytes.

    Raises:
        HeaderError: the file is too short for the header it announces, or announces an absurd one.
    """
    if len(prefix) < 8:
        raise HeaderError(f"{where}: truncated: {file_size} bytes cannot hold a safetensors header")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"{where}: not a safetensors file: it announces a header of {length} bytes")
    if 8 + length > file_size:
        raise HeaderError(f"{where}: truncated: the header ends at byte {8 + length}, the file at {file_size}")
    return int(length)


def parse_header(raw: bytes, file_size: int, file: str, where: str) -> dict[str, TensorInfo]:
    """Parse and validate a header.

    Args:
        raw: the JSON header, without the 8 length bytes.
        file_size: size of the whole file; the tensors must fill it exactly.
        file: the file's name, stored in every TensorInfo.
        where: the model and file, for messages.

    Returns:
        The tensors in the order of their bytes in the file.

    Raises:
        HeaderError: anything the format forbids: malformed JSON, duplicate names, unknown dtypes, shapes
            that disagree with the offsets, offsets that overlap, leave a gap or leave the file.
    """
    data_start = 8 + len(raw)
    infos: list[TensorInfo] = []
    for name, entry in entries(raw, where):
        if len(infos) == MAX_TENSORS:
            raise HeaderError(f"{where}: more than {MAX_TENSORS} tensors in one file")
        infos.append(_parse_entry(name, entry, data_start, file, where))
    infos.sort(key=lambda info: (info.start, info.stop))
    position = data_start
    for info in infos:
        if info.stop > file_size:
            raise HeaderError(
                f"{where}: truncated or corrupt: tensor {info.name!r} ends at byte {info.stop}, "
                f"the file at {file_size}; download the file again"
            )
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise HeaderError(f"{where}: tensor {info.name!r} {problem} (byte {info.start}, expected {position})")
        position = info.stop
    if position != file_size:
        raise HeaderError(f"{where}: the tensors end at byte {position}, the file at {file_size}")
    return {info.name: info for info in infos}


def encode_header(infos: Iterable[TensorInfo], data_start: int = 0) -> bytes:
    """The 8 length bytes and the JSON header, padded with spaces to a multiple of 8 bytes.

    Args:
        infos: tensors whose `start` and `stop` count from `data_start`.
        data_start: what to subtract from the offsets.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for info in infos:
        offsets = [info.start - data_start, info.stop - data_start]
        table[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _parse_entry(name: str, entry: Any, data_start: int, file: str, where: str) -> TensorInfo:
    place = f"{where}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{place}: an entry needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"{place}: unknown dtype {reprlib.repr(dtype)}")
    numel = _numel(shape) if _are_counts(shape) else None
    if numel is None:
        raise HeaderError(f"{place}: bad shape {reprlib.repr(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"{place}: {len(shape)} dimensions, {MAX_DIMENSIONS} is the most")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{place}: bad data_offsets {reprlib.repr(offsets)}")
    if DTYPES[dtype].bits * numel != 8 * (offsets[1] - offsets[0]):
        raise HeaderError(f"{place}: {dtype} {reprlib.repr(shape)} does not fit its {offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _numel(shape: list[int]) -> int | None:
    """The product, or None once it passes 63 bits: a hostile shape must not become a number of millions of digits."""
    numel = 1
    for size in shape:
        numel *= size
        if numel >= 2**63:
            return None
    return numel


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
