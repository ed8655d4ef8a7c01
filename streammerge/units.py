"""Byte counts to and from the text people write: "5GB", "256MiB", "1.5e9"."""

import re

from streammerge.errors import RecipeError

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")},
    **{f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")},
}


def parse_size(text: str | int, option: str = "") -> int:
    """Read a number of bytes: `5GB` is 5 * 10**9, `5GiB` is 5 * 2**30, a bare number is bytes.

    Args:
        option: where it was typed, for messages.

    Raises:
        RecipeError: the text is not a size, or not a positive one.
    """
    where = f"{option}: " if option else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise RecipeError(f"{where}{text!r} is not a size; write for example 5GB, 256MiB or 1000000")
    number = float(match[1]) * factor
    size = int(number) if number < 2**63 else 0
    if size <= 0:
        raise RecipeError(f"{where}a size must be at least one byte and below 2**63, not {text!r}")
    return size


def format_size(count: float) -> str:
    """Three significant digits and a decimal unit: 1234567 -> "1.23 MB"."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.3g} {units[0]}"


def format_memory(count: float) -> str:
    """Memory in binary units, as `--max-ram` is usually given: 268435456 -> "256 MiB"."""
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"
