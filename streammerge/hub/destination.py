"""Where a push goes and what it shows there, told before it begins: by `plan`, and as notes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

Destination = Mapping[str, Any]  # see `HubTarget.destination`; with "local_paths" and "unwritable"


def local_paths(result: Mapping[str, Any]) -> list[str]:
    """The paths on this machine that a manifest names: of models, Fishers and texts.

    Args:
        result: what has the keys "sources" and "recipe" of a manifest.
    """
    sources, recipe = _list(result.get("sources")), _mapping(result.get("recipe"))
    local = [source for source in map(_mapping, sources) if not source.get("revision")]
    found: list[Any] = [str(s.get("id")).removeprefix("Fisher " if s.get("role") == "fisher" else "") for s in local]
    found += [*_list(recipe.get("fisher_from")), *_list(_mapping(recipe.get("calibration")).get("text"))]
    found.append(_mapping(recipe.get("fisher")).get("probe_text"))
    return list(dict.fromkeys(path for path in found if isinstance(path, str)))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last component of each path, with a number behind it where two have the same."""
    names: dict[str, str] = {}  # by absolute path
    for path in map(os.path.abspath, paths):
        first = os.path.basename(path) or "folder"
        numbered = (first if number == 1 else f"{first}-{number}" for number in itertools.count(1))
        names.setdefault(path, next(name for name in numbered if name not in names.values()))
    return {path: names[os.path.abspath(path)] for path in paths}


def notes_of(destination: Destination) -> list[str]:
    """What a user should know before anything is pushed."""
    found = []
    if replaced := destination["replaces"]:
        where = f"{destination['repository']} at commit {destination['commit']}"
        found.append(f"the push replaces {' and '.join(replaced)} of {where}")
    if paths := destination["local_paths"]:
        found.append(f"the manifest names local folders or files: {', '.join(paths)}")
    if folder := destination["unwritable"]:
        found.append(unwritable_text(folder))
    return found


def unwritable_text(folder: str) -> str:
    """What to do where a push that keeps nothing has no place to work in."""
    return (
        f"without --out the work is done in {folder}, which cannot be written: set HF_HOME or HF_ASSETS_CACHE to a "
        "folder that can, or give --out"
    )


def destination_text(destination: Destination) -> str:
    """One line for `plan`."""
    where = f"{destination['repository']}, branch {destination['branch']}"
    text = f"a pull request to {where}" if destination["pull_request"] else where
    told = []
    if destination["new_repository"]:
        told.append("a new repository")
    elif destination["new_branch"]:
        told.append("a new branch of a repository that is there")
    else:
        told.append("which is there")
    if destination["private"] is None:
        told.append("as visible as your new repositories are")
    else:
        told.append("private" if destination["private"] else "public")
    return f"{text}: {', '.join(told)}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
