"""What tells two runs apart, in words for whoever gives one command to finish the other's work."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MAX_CHARACTERS = 100
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ABSENT: Any = object()

Model = Mapping[str, Any]  # {"id", "revision", "fingerprint", "files"}, and a "role" where it is one of several


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every place where the identities of two runs differ, with what it was and is; empty if they are the same.

    An identity is what the bytes of a run depend on, as JSON. Its `sources` are models, and so is a `base`. The
    `layout` follows from the rest: it is named only where nothing else is.
    """
    found: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        if key == "sources" and _are_models(old.get(key)) and key in new:
            found += _sources(old[key], new[key])
        elif key != "layout":
            found += _differing(key, old.get(key, _ABSENT), new.get(key, _ABSENT))
    return found or sorted(key for key in {*old, *new} if old.get(key, _ABSENT) != new.get(key, _ABSENT))


def _are_models(value: Any) -> bool:
    """False for what no run of ours has recorded."""
    return isinstance(value, list) and all(_is_model(entry) and "role" in entry for entry in value)


def _is_model(value: Any) -> bool:
    known = isinstance(value, dict) and value.keys() >= {"id", "revision", "fingerprint", "files"}
    return known and isinstance(value["files"], dict)


def _sources(old: Sequence[Model], new: Sequence[Model]) -> Iterator[str]:
    """The models that changed under their names; other names are another recipe, which says so itself."""
    for before, now in zip(old, new, strict=False):
        if before != now and (before["role"], before["id"]) == (now["role"], now["id"]):
            yield _model(now["role"], before, now)


def _differing(place: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        if _is_model(old) and _is_model(new):
            yield _model(place, old, new)
            return
        for key in dict.fromkeys((*old, *new)):
            yield from _differing(f"{place}.{key}", old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif isinstance(old, list) and isinstance(new, list):
        for number in range(max(len(old), len(new))):
            pair = (values[number] if number < len(values) else _ABSENT for values in (old, new))
            yield from _differing(f"{place}[{number}]", *pair)
    else:
        yield f"{place} ({_quoted(old)} -> {_quoted(new)})"


def _model(role: str, old: Model, new: Model) -> str:
    """Whether it is another model, another revision, or the same with other tensors."""
    if old["id"] != new["id"]:
        return f"{role} ({_quoted(old['id'])} -> {_quoted(new['id'])})"
    if old["revision"] != new["revision"]:
        return f"{role} {new['id']} (revision {_quoted(old['revision'])} -> {_quoted(new['revision'])})"
    if old["fingerprint"] != new["fingerprint"]:
        return f"{role} {new['id']} (its tensors have changed)"
    before, now = old["files"], new["files"]  # the fingerprint is of a few samples, which a change may miss
    changed = min(file for file in {*before, *now} if before.get(file) != now.get(file))
    return f"{role} {new['id']} ({changed} was written to since)"


def _quoted(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "none"
    if isinstance(value, dict) and "model" in value:  # one of a recipe, with its parameters
        value = value["model"]
    text = value if isinstance(value, str) else json.dumps(value)
    if _DIGEST.fullmatch(text):
        return f"{text[:12]}..."
    half = _MAX_CHARACTERS // 2  # two paths often differ at their ends
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]}...{text[-half:]}"
