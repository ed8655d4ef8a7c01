"""Which names of files may be trusted with a path, and what may name a model.

Names of files come from indexes, manifests and the Hub's listings.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError

Named = str | os.PathLike[str]  # a model or a folder

_LONGEST_PART, _LONGEST = 255, 1024  # bytes; of every usual file system, and of macOS for a path


def unsafe_name(name: str) -> str | None:
    """Why a file of that name, relative with slashes, must not be touched; None where it may be.

    A name must mean the same file inside the folder on every system: Windows reads backslashes and drive letters.
    """
    parts = name.split("/")
    if re.match(r"/|\\|[A-Za-z]:", name):
        return "it is an absolute path"
    if ".." in parts or "\\" in name:
        return "it leads outside the folder" if ".." in re.split(r"[/\\]", name) else "it has a backslash in it"
    if any(part in ("", ".") for part in parts):
        return "it is no plain path"
    if not name.isprintable():
        return "it has characters in it that cannot be printed"
    encoded = name.encode("utf-8")
    if len(encoded) > _LONGEST or any(len(part.encode("utf-8")) > _LONGEST_PART for part in parts):
        return "it is too long"
    return None


def folded(name: str) -> str:
    """What two names have in common that are one file where case and Unicode form do not count (macOS, Windows)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of the names of which one would overwrite the other, or be a folder where the other is a file."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        if (other := seen.setdefault(folded(name), name)) != name:
            return other, name
    for name in sorted(seen.values()):
        parts = name.split("/")
        for count in range(1, len(parts)):
            if (other := seen.get(folded("/".join(parts[:count])), "")) != "":
                return other, name
    return None


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a file, its links followed, lies in the folder; or in the blobs that a snapshot of the Hub's cache links.

    The cache (`models--org--name/snapshots/COMMIT`) is made of links into `models--org--name/blobs`.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    if root in target.parents:
        return True
    snapshots, repository = root.parent, root.parent.parent
    return snapshots.name == "snapshots" and target.parent == repository / "blobs"


def path_as_text(value: Any) -> Any:
    """A path as text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def named(model: Named) -> str:
    """A model, or a folder, as text.

    Raises:
        RecipeError: it is neither a text nor a path.
    """
    text = path_as_text(model)
    if not isinstance(text, str):
        raise RecipeError(f"model {text!r}: name it by a text or a path")
    return text
