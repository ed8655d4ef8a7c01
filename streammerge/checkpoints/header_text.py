"""The text of a safetensors header, taken apart entry by entry, so that no more than one is in memory as objects.

A parser that makes objects of all of it first takes 20 to 100 times its length, for a header that is made for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from streammerge.checkpoints.json_text import unique_keys
from streammerge.errors import HeaderError

MAX_NAME = 1000  # characters: a name is shown in messages
MAX_ENTRY = 4000  # characters of dtype, shape and offsets
MAX_METADATA = 1_000_000  # characters of notes by whoever wrote the file

_METADATA = "__metadata__"
_OPEN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\})?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*(?:(\})|,[ \t\n\r]*)")
_REST = re.compile(r"[ \t\n\r]*\Z")
_ENTRY = re.compile(r"\{[^{}]*+\}")  # no text in an entry has a brace
_NOTES = re.compile(r'\{(?:[^"{}]|"(?:[^"\\]|\\.)*+")*+\}')


def entries(raw: bytes, where: str) -> Iterator[tuple[str, Any]]:
    """Every tensor's name with its entry, of whatever kind, in the order of the text. The metadata are checked only.

    Raises:
        HeaderError: not UTF-8, not a JSON object, a name that is too long or there already, an entry that is none.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"{where}: the header is not valid JSON ({error})") from None
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys(where))
    seen: set[str] = set()
    start = _OPEN.match(text)
    if start is None:
        raise HeaderError(f"{where}: the header is not a JSON object")
    end, position = start[1], start.end()
    while end is None:
        name, position = _name(text, position, decoder, where)
        if name in seen:
            raise HeaderError(f"{where}: duplicate name {name!r}")
        seen.add(name)
        value, position = _value(name, text, position, decoder, where)
        if name != _METADATA:
            yield name, value
        following = _NEXT.match(text, position)
        if following is None:
            raise _invalid(where, position)
        end, position = following[1], following.end()
    if _REST.match(text, position) is None:
        raise _invalid(where, position)


def bad_tensor_name(name: str) -> str | None:
    """Why no tensor may have that name; None where one may. Control characters are allowed, and never shown as such."""
    if len(name) > MAX_NAME:
        return f"a name of {len(name)} characters, {MAX_NAME} is the most"
    return "the name is not valid Unicode" if any("\ud800" <= c <= "\udfff" for c in name) else None


def _name(text: str, position: int, decoder: json.JSONDecoder, where: str) -> tuple[str, int]:
    """A name and where its value begins."""
    if text[position : position + 1] != '"':
        raise _invalid(where, position)
    try:
        name, position = decoder.raw_decode(text, position)
    except ValueError:
        raise _invalid(where, position) from None
    colon = _COLON.match(text, position)
    if colon is None:
        raise _invalid(where, position)
    if reason := bad_tensor_name(name):
        raise HeaderError(f"{where}: tensor {name[:99]!r}: {reason}")
    return name, colon.end()


def _value(name: str, text: str, position: int, decoder: json.JSONDecoder, where: str) -> tuple[Any, int]:
    """A tensor's entry, or the metadata, and where it ends."""
    notes = name == _METADATA
    limit = position + (MAX_METADATA if notes else MAX_ENTRY)
    match = (_NOTES if notes else _ENTRY).match(text, position, limit)
    if match is None and notes:
        raise HeaderError(f"{where}: {_METADATA} must map text to text, in at most {MAX_METADATA} characters")
    if match is None:
        raise HeaderError(f"{where}: tensor {name!r}: an entry needs exactly dtype, shape and data_offsets")
    try:
        value = decoder.decode(match[0])
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: tensor {name!r}: not valid JSON ({str(error)[:100]})") from None
    if notes and not all(isinstance(note, str) for note in value.values()):
        raise HeaderError(f"{where}: {_METADATA} must map text to text")
    return value, match.end()


def _invalid(where: str, position: int) -> HeaderError:
    return HeaderError(f"{where}: the header is not valid JSON (character {position})")
