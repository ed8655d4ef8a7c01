"""Which differences between base and fine-tune are fine, noted, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tiny_models import EMBEDDING, HEAD, MATRIX, Models, Run, edit, edit_config, put, tensors

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.compatibility import Match, match_experts, refuse_quantised
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError

Spoil = Callable[[Path], object]


def match(models: Models) -> Match:
    with Checkpoint.open(models.base, id="base") as base, Checkpoint.open(models.ft, id="ft") as ft:
        (found,) = match_experts(base, [ft])
        assert list(found.tensors) == [*base.tensors]
    return found


def untie(folder: Path, fill: float = 1.0) -> None:
    put(folder, HEAD, torch.full((48, 16), fill))
    edit_config(folder, tie_word_embeddings=False)


def test_a_plain_pair_needs_no_note(models: Models) -> None:
    found = match(models)
    assert found.notes == []
    assert all(name == info.name for name, info in found.tensors.items())


# --- tied embeddings ----------------------------------------------------------------------------------------------


def test_a_tied_base_leaves_out_the_head_of_its_fine_tune(models: Models) -> None:
    untie(models.ft)
    note = f"ft: tensor '{HEAD}' was left out: the base ties its head to '{EMBEDDING}', which serves as the head of"
    assert [line[: len(note)] for line in match(models).notes] == [note]


def test_a_tied_fine_tune_lends_its_embedding_to_the_head_of_the_base(models: Models) -> None:
    untie(models.base)
    found = match(models)
    assert found.tensors[HEAD].name == EMBEDDING
    assert found.notes == [f"ft: ties '{HEAD}' to '{EMBEDDING}'; that tensor was used for the base's head"]


def test_two_untied_models_merge_their_heads(models: Models) -> None:
    untie(models.base)
    untie(models.ft)
    found = match(models)
    assert (found.tensors[HEAD].name, found.notes) == (HEAD, [])


def test_tying_is_read_from_a_nested_config_too(models: Models) -> None:
    edit_config(models.base, tie_word_embeddings=False, text_config={"tie_word_embeddings": True})
    put(models.ft, HEAD, torch.ones(48, 16))
    assert len(match(models).notes) == 1


@pytest.mark.parametrize("direction", ["base", "ft"])
def test_tied_and_untied_merge_in_values(models: Models, tmp_path: Path, run: Run, direction: str) -> None:
    untie(getattr(models, direction), 2.0)
    out = tmp_path / "out"
    pair = ("--base", models.base, "--ft", models.ft, "-m", "task_arithmetic", "--coefficient", "0.5", "--out", out)
    assert run(*pair).code == 0
    base, ft, merged = tensors(models.base), tensors(models.ft), tensors(out)
    assert merged.keys() == base.keys()
    for name in merged:
        other = ft.get(name, ft[EMBEDDING])
        torch.testing.assert_close(merged[name], (base[name] + other) / 2)


UNEXPLAINED: dict[str, tuple[Callable[[Models], object], str]] = {
    "an untied base needs a head": (lambda m: (untie(m.base), edit_config(m.ft, tie_word_embeddings=False)), "missing"),
    "a head of another size": (lambda m: put(m.ft, HEAD, torch.ones(40, 16)), "has no counterpart in the base"),
    "a head nobody ties": (
        lambda m: (edit_config(m.base, tie_word_embeddings=False), put(m.ft, HEAD, torch.ones(48, 16))),
        "has no counterpart in the base",
    ),
    "an embedding of another size lent as a head": (
        lambda m: (untie(m.base), put(m.ft, EMBEDDING, torch.ones(50, 16))),
        "is [50, 16], in the base [48, 16]",
    ),
}


@pytest.mark.parametrize(("change", "words"), UNEXPLAINED.values(), ids=UNEXPLAINED)
def test_heads_that_are_not_explained(models: Models, change: Callable[[Models], object], words: str) -> None:
    change(models)
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        match(models)
    assert any(HEAD in line and words in line for line in caught.value.mismatches)


# --- tensors and settings that may differ -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
    ],
)
def test_buffers_are_left_out_with_a_note(models: Models, name: str) -> None:
    put(models.ft, name, torch.ones(4))
    assert match(models).notes == [f"ft: tensor '{name}' was left out: a buffer that the model computes itself"]


@pytest.mark.parametrize("name", ["x.rotary_emb.inv_freq.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"])
def test_what_only_looks_like_a_buffer_is_refused(models: Models, name: str) -> None:
    put(models.ft, name, torch.ones(4))
    with pytest.raises(IncompatibleCheckpointsError, match="has no counterpart in the base"):
        match(models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_dtypes_may_differ(models: Models, dtype: torch.dtype) -> None:
    edit(models.ft, lambda state: state.update({name: value.to(dtype) for name, value in state.items()}))
    assert match(models).notes == []


@pytest.mark.parametrize(("ours", "theirs"), [(torch.int32, torch.int64), (torch.float32, torch.int32)])
def test_integers_must_be_the_same_kind(models: Models, ours: torch.dtype, theirs: torch.dtype) -> None:
    put(models.base, "x", torch.ones(2, dtype=ours))
    put(models.ft, "x", torch.ones(2, dtype=theirs))
    with pytest.raises(IncompatibleCheckpointsError, match="tensor 'x' is I"):
        match(models)


@pytest.mark.parametrize(
    "values", [{"max_position_embeddings": 7}, {"sliding_window": 3}, {"rope_parameters": {"rope_theta": 1.5}}]
)
def test_settings_worth_a_note(models: Models, values: dict[str, Any]) -> None:
    edit_config(models.base, **dict.fromkeys(values, 9))
    edit_config(models.ft, **values)
    ((key, value),) = values.items()
    assert match(models).notes == [f"ft: config {key} is {value!r}; the output keeps the base's 9"]


def test_settings_one_model_leaves_out_are_no_mismatch(models: Models) -> None:
    edit_config(models.ft, num_key_value_heads=None, max_position_embeddings=None, hidden_act=None)
    assert match(models).notes == []


def test_every_model_is_named_with_its_own_differences(models: Models) -> None:
    edit(models.ft, lambda state: state.pop(MATRIX))
    edit_config(models.ft2, model_type="llama")
    opened = [Checkpoint.open(folder, id=folder.name) for folder in models]
    try:
        with pytest.raises(IncompatibleCheckpointsError) as caught:
            match_experts(opened[0], opened[1:])
    finally:
        for model in opened:
            model.close()
    assert caught.value.mismatches == (
        f"ft: tensor '{MATRIX}' is missing",
        "ft2: config model_type is 'llama', in the base 'qwen2'",
    )
    assert str(caught.value).startswith("these models cannot be merged into base:\n  - ft: ")


# --- quantised models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"), [({"quant_method": "awq"}, "awq"), ({"bits": 4}, "unknown"), ("int4", "unknown")]
)
def test_a_quantisation_config_is_named(models: Models, settings: Any, name: str) -> None:
    edit_config(models.base, quantization_config=settings)
    with Checkpoint.open(models.base) as base, pytest.raises(CheckpointError, match=rf"quantised \({name}\)"):
        refuse_quantised(base)


@pytest.mark.parametrize("name", ["scales", "model.scales.weight", "model.layers.0.scale", "model.blocks"])
def test_ordinary_names_are_not_taken_for_quantised_ones(models: Models, name: str) -> None:
    put(models.base, name, torch.ones(2))
    edit_config(models.base, quantization_config=None)
    with Checkpoint.open(models.base) as base:
        refuse_quantised(base)


# --- the same model more than once --------------------------------------------------------------------------------


def noted(base: Path, *experts: Path) -> list[str]:
    recipe = {"base": str(base), "models": [str(expert) for expert in experts], "method": "linear"}
    with streammerge.plan(recipe) as planned:
        return planned.notes


def test_a_model_that_is_the_base_or_given_before_is_noted(models: Models, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(models.ft)
    other = models.base.parent / "ft" / ".." / "base"
    is_base = f"{other}: is the base itself: its task vector is 0, and a mean of all models counts it twice"
    twice = "is given more than once, and counts each time"
    assert noted(models.base, models.ft, models.ft2) == []
    assert noted(models.base, other) == [is_base]
    assert noted(models.base, models.ft, link, models.ft2, models.ft) == [f"{link}: {twice}", f"{models.ft}: {twice}"]
    assert noted(models.base, other, other) == [is_base, is_base]


def test_a_copy_is_another_model(models: Models, tmp_path: Path) -> None:
    """Decided by the folder: no data is read for it."""
    assert noted(models.base, Path(copytree(models.base, tmp_path / "copy"))) == []


def test_the_base_itself_is_told_by_plan_merge_and_manifest(models: Models, tmp_path: Path, run: Run) -> None:
    text = f"{models.base}: is the base itself: its task vector is 0, and a mean of all models counts it twice"
    pair = ("--base", models.base, "--ft", models.base, "-m", "task_arithmetic")
    assert text in run("plan", *pair).out
    assert f"note: {text}" in run(*pair, "--out", tmp_path / "m", "-q").out
    assert json.loads((tmp_path / "m" / "streammerge.json").read_text())["notes"] == [text]
    for name, values in tensors(tmp_path / "m").items():
        assert torch.equal(values, tensors(models.base)[name])
