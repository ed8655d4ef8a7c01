"""Each guard is needed: without it, bad input passes."""

import json
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from bad_input.faults import BROKEN, UNLIKE, edit_record, point_outside
from bad_input.refusals import TASK_ARITHMETIC, Spoil, command, refused
from tiny_models import EMBEDDING, INDEX, Models, Run, spoil

from streammerge.checkpoints.files import Files

FIM_BY_NORM = ("--method", "fim_ta", "--importance", "norm")


def _any_dict(where: str) -> type:
    return dict


def _map(files: Files) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads(files.text(INDEX))["weight_map"]
    return weight_map


def _pass(*args: object, **kwargs: object) -> None: ...


def _none(*args: object) -> list[str]:
    return []


def _duplicate_in_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "another",' + text.lstrip()[1:])


def _other_base(folder: Path) -> None:
    edit_record(folder.parent / "fisher", lambda record: record["base"].update(fingerprint="0" * 64))


# module and guard, what stands in for the guard, the fault, the options
Guard = tuple[str, str, Any, Spoil, tuple[str, ...]]
WITH_FISHER = ("--fisher", "{root}/fisher")
GUARDS: dict[str, Guard] = {
    # of a tensor of which the base's is taken: a merged one is looked at again
    "finite values": ("row_reader", "require_finite", _pass, lambda f: spoil(f, EMBEDDING, torch.nan), FIM_BY_NORM),
    "quantised": ("plan", "refuse_quantised", _pass, BROKEN["quantised by its config"][0], TASK_ARITHMETIC),
    "duplicates": ("checkpoints.json_text", "unique_keys", _any_dict, _duplicate_in_config, TASK_ARITHMETIC),
    "paths in an index": ("checkpoints.weight_files", "_read_weight_map", _map, point_outside, TASK_ARITHMETIC),
    "index and headers": (
        "checkpoints.checkpoint",
        "check_index",
        _pass,
        BROKEN["index of other tensors"][0],
        TASK_ARITHMETIC,
    ),
    "structure": ("compatibility", "_config_mismatches", _none, UNLIKE["architecture"][0], TASK_ARITHMETIC),
    "free output": ("merge", "check_output", _pass, lambda f: f, (*TASK_ARITHMETIC, "--out", "{root}/ft")),
    "the Fisher's base": ("merge", "check_same_base", _pass, _other_base, WITH_FISHER),
    "the Fisher's settings": ("fisher.store", "_differences", _none, lambda f: f, (*WITH_FISHER, "--fisher-seed", "1")),
    "a value per model": (
        "recipe",
        "_for_expert",
        lambda key, value, *_: value[0],
        lambda f: f,
        ("--density", "1", "--density", "0", "--density", "1"),
    ),
    "keys given twice": (
        "yaml_text",
        "_Loader",
        lambda text, most: yaml.SafeLoader(text),
        lambda f: f,
        ("{root}/recipe.yaml",),
    ),
}


@pytest.mark.parametrize(("module", "guard", "instead", "change", "options"), GUARDS.values(), ids=GUARDS)
def test_without_its_guard_bad_input_passes(
    models: Models,
    saved_fisher: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    guard: str,
    instead: Any,
    change: Spoil,
    options: tuple[str, ...],
) -> None:
    copytree(saved_fisher, tmp_path / "fisher")
    (tmp_path / "recipe.yaml").write_text("method: ties\nmethod: task_arithmetic\n")
    change(models.ft)
    arguments = command(models, tmp_path, *(option.format(root=tmp_path) for option in options))
    refused(run, tmp_path, arguments)
    monkeypatch.setattr(import_module(f"streammerge.{module}"), guard, instead)
    assert run(*arguments).code == 0
