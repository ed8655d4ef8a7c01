"""Text from strangers made fit to be shown: names, ids and values may drive a terminal, or forge a line of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def visible(text: str) -> str:
    r"""The text with every character that is not printed written as its escape: ESC as \x1b, a line's end as \n.

    That is also what changes the direction of writing (U+202E), what has no width (U+200B), unpaired surrogates, and
    every blank but the space.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def all_visible(value: Any) -> Any:
    """A plain structure with every text in it made `visible`, the keys too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {all_visible(key): all_visible(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_visible(item) for item in value]
    return value
