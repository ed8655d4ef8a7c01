"""The safetensors header: bytes <-> {name: TensorInfo}. Pure, without torch, trusting nothing.

Layout of a file: the header's length as an unsigned 64-bit little-endian integer, the header (a JSON
object), then the tensors' bytes without a gap. Each entry is `{"dtype", "shape", "data_offsets"}`, the
offsets counted from the end of the header.
Reference: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from streammerge.errors import HeaderError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


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
    entries = _parse_json(raw, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(f"{where}: __metadata__ must map text to text")
    data_start = 8 + len(raw)
    infos = [_parse_entry(name, entry, data_start, file, where) for name, entry in entries.items()]
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
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for info in infos:
        offsets = [info.start - data_start, info.stop - data_start]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def unique_keys(where: str) -> Any:
    """An `object_pairs_hook` for json that refuses duplicate keys instead of keeping the last."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise HeaderError(f"{where}: duplicate name {key!r}")
            result[key] = value
        return result

    return build


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys(where))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: the header is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(entries, dict):
        raise HeaderError(f"{where}: the header is not a JSON object")
    return entries


def _parse_entry(name: str, entry: Any, data_start: int, file: str, where: str) -> TensorInfo:
    place = f"{where}: tensor {name!r}"
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise HeaderError(f"{place}: the name is not valid Unicode")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{place}: an entry needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"{place}: unknown dtype {dtype!r}")
    numel = _numel(shape) if _are_counts(shape) else None
    if numel is None:
        raise HeaderError(f"{place}: bad shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{place}: bad data_offsets {str(offsets)[:80]}")
    if DTYPES[dtype].bits * numel != 8 * (offsets[1] - offsets[0]):
        raise HeaderError(f"{place}: {dtype} {shape} does not fit its {offsets[1] - offsets[0]} bytes")
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
