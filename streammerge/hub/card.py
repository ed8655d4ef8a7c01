"""The model card: metadata that the Hub reads, the recipe to run again, what was done to each block."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from streammerge._version import __version__
from streammerge.checkpoints.checkpoint import CARD_FILE, PLOT_FILE, Checkpoint
from streammerge.figures import can_draw, coefficients, picture, quiet, stacked
from streammerge.hub.destination import local_paths, short_names
from streammerge.plan import MergePlan
from streammerge.report import at_commit, block_rows
from streammerge.yaml_text import parse_yaml

_MOST_CARD_BYTES, _MOST_CARD_VALUES = 1_000_000, 100_000
_LONGEST_LICENCE = 100  # characters; a licence is named by a word

Licence = dict[str, Any]  # the keys of a model's metadata that begin with "license"


def stated_licence(model: Checkpoint) -> Licence:
    """The licence that a model's own card states in its metadata; {} where it states none."""
    files = model.files
    if files.folder is not None:
        path = files.folder / CARD_FILE
        raw = _beginning(path) if path.is_file() else b""
    else:
        raw = _beginning(files.path(CARD_FILE)) if files.has(CARD_FILE) else b""
    opening, _, rest = raw.decode("utf-8", "replace").partition("---")
    block, closing, _ = rest.partition("\n---")
    try:
        values = parse_yaml(block, _MOST_CARD_VALUES) if closing and not opening.strip() else {}
    except ValueError:
        return {}  # somebody else's mistake, and only a card
    return {key: value for key in _LICENCE_KEYS if (value := _word(values, key))} if _word(values, "license") else {}


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_CARD_BYTES)


_LICENCE_KEYS = ("license", "license_name", "license_link")


def _word(values: Any, key: str) -> str | None:
    value = values.get(key) if isinstance(values, dict) else None
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_LICENCE else None


def model_card(plan: MergePlan, result: Mapping[str, Any], licences: Sequence[Licence]) -> str:
    """The output's README.md.

    Args:
        plan: the merge.
        result: its manifest; where that names the plot among its files, the card shows it.
        licences: what `stated_licence` says of the base and of each fine-tuned model.
    """
    names = [plan.base.id, *(expert.id for expert in plan.experts)]
    local = short_names(local_paths(result))  # where they lie is nobody's business
    shown = [_code(local.get(name, name)) for name in names]
    licence, section = _common_licence(shown, licences)
    metadata = {**_origin(result), "library_name": "transformers", **licence, "tags": ["merge", "streammerge"]}
    own = "; replace the names of local folders by your own" if local else ""
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# Merge of {' and '.join(shown[1:])} into {shown[0]}",
        f"Made with streammerge {__version__}, method `{plan.recipe.method}` ({plan.method.summary}; "
        f"{plan.method.reference}).",
        "| role | model | revision |\n|---|---|---|\n"
        + "\n".join(_source_row(source, local) for source in result["sources"]),
        section,
        f"## Recipe\n\nSave as `recipe.yaml` and run `streammerge merge recipe.yaml --out merged`{own}:",
        _recipe_block(_renamed(_pinned(result), {os.path.abspath(path): name for path, name in local.items()})),
    ]
    if result["notes"]:
        sections.append("## Notes\n\n" + "\n".join(f"- {_plain(_without_paths(n, local))}" for n in result["notes"]))
    if result["blocks"]:
        header, rows = block_rows(result)
        rows = [[_without_paths(cell, local) for cell in row] for row in rows]
        lines = [" | ".join(map(_plain, row)) for row in (header, ["---"] * len(header), *rows)]
        plot = f"![Merge coefficient of each decoder block]({PLOT_FILE})\n\n" if PLOT_FILE in result["files"] else ""
        sections.append(f"## Blocks\n\n{plot}" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(filter(None, sections)) + "\n"


def _source_row(source: Mapping[str, Any], local: Mapping[str, str]) -> str:
    name = _code(local.get(source["id"]) or _without_paths(source["id"], local))
    name += "" if source["revision"] else " (local folder)"
    return f"| {source['role']} | {name} | {_plain(source['revision'] or '-')} |"


def _without_paths(text: str, local: Mapping[str, str]) -> str:
    """The text with the name of each path in it instead of the path, longer paths first."""
    for path in sorted(local, key=len, reverse=True):
        if "/" in path or "\\" in path:
            text = text.replace(path, local[path])
    return text


def _renamed(value: Any, local: Mapping[str, str]) -> Any:
    """A recipe with the name of each path instead of the path, however it is written; `local` has absolute ones."""
    if isinstance(value, Mapping):
        return {k: v if k in ("method", "parameters") else _renamed(v, local) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(item, local) for item in value]
    return local.get(os.path.abspath(value), value) if isinstance(value, str) and value else value


def coefficient_plot(result: Mapping[str, Any]) -> bytes | None:
    """A PNG of the merge coefficients over the blocks; None without coefficients, or without matplotlib."""
    rows = [row for row in result["blocks"] if row.get("alpha") is not None]
    if not rows or not can_draw():
        return None
    with quiet():
        figure, (axis,) = stacked(7, 3, 1)
        experts = list(dict.fromkeys(row.get("expert") for row in rows))
        coefficients(axis, rows, {expert: f"{number}: {expert}" for number, expert in enumerate(experts, 1)})
        return picture(figure, "png")


def _origin(result: Mapping[str, Any]) -> dict[str, Any]:
    """The models that the Hub knows."""
    ids = [source["id"] for source in result["sources"] if source["revision"] and source["role"] != "fisher"]
    return {"base_model": list(dict.fromkeys(ids)), "base_model_relation": "merge"} if ids else {}


def _pinned(result: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with each model on the Hub at the commit it was read from."""
    recipe, sources = result["recipe"], result["sources"]
    base, *experts = [source for source in sources if source["role"] != "fisher"]
    pairs = zip(recipe["models"], experts, strict=True)
    models = [{**model, "model": at_commit(model["model"], source)} for model, source in pairs]
    return {**recipe, "base": at_commit(recipe["base"], base), "models": models}


def _common_licence(names: Sequence[str], licences: Sequence[Licence]) -> tuple[Licence, str]:
    """The metadata and, where the models do not agree or state nothing, the section that says so."""
    stated = [licence for licence in licences if licence]
    if not stated:
        return {}, "## Licence\n\nNone of the models states a licence."
    if all(licence == licences[0] for licence in licences):
        return dict(licences[0]), ""
    words = [licence.get("license_name") or licence["license"] for licence in stated]
    told = [f"- {name}: {_told(licence)}" for name, licence in zip(names, licences, strict=True)]
    text = "## Licence\n\nThe models' licences differ, and what may be done with this merge depends on all of them:\n\n"
    common = {"license": "other", "license_name": "-and-".join(dict.fromkeys(words))}
    return common if all(licences) else {"license": "unknown"}, text + "\n".join(told)


def _told(licence: Licence) -> str:
    if not licence:
        return "states none"
    link = f", see {_code(licence['license_link'])}" if "license_link" in licence else ""
    return _code(licence.get("license_name") or licence["license"]) + link


def _recipe_block(recipe: Mapping[str, Any]) -> str:
    """The recipe as a block of YAML, with a fence that no text in it can close."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=math.inf)
    if not all(line.isprintable() for line in text.split("\n")):  # YAML takes more for printable than is
        text = yaml.safe_dump(recipe, sort_keys=False, width=math.inf)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def _code(text: str) -> str:
    return f"`{_bare(text)}`"


def _plain(text: str) -> str:
    """Text that cannot break out of a Markdown line or cell, nor become a link or a picture."""
    return re.sub(r"[\[\]]", r"\\\g<0>", _bare(text))


def _bare(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in "`<>|")
