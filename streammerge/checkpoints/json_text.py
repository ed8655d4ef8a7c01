"""JSON from strangers: bounded in size, depth and number, each key once."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from streammerge.errors import HeaderError

MAX_TEXT_BYTES = 64_000_000  # an index of half a million tensors; the largest published models have 150,000
MAX_VALUES = 2_000_000  # so that what is parsed stays within some hundred MB
MAX_DEPTH = 50


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        raw: the file.
        where: the model and file, for messages.

    Raises:
        HeaderError: too large, not UTF-8, not JSON, not an object, a key given twice, or nested too deep.
    """
    if len(raw) > MAX_TEXT_BYTES:
        raise HeaderError(f"{where}: larger than {MAX_TEXT_BYTES} bytes")
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:  # before the objects are made, which take up to 100 times
        raise HeaderError(f"{where}: more than {MAX_VALUES} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys(where))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: not a JSON object")
    if _depth_exceeds(value, MAX_DEPTH):
        raise HeaderError(f"{where}: nested more than {MAX_DEPTH} deep")
    return value


def unique_keys(where: str) -> Any:
    """An `object_pairs_hook` for json that refuses duplicate keys instead of keeping the last."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = dict(pairs)
        if len(result) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise HeaderError(f"{where}: duplicate name {twice[:200]!r}")
        return result

    return build


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return False
    return True
