"""Tensors of the files and parameters of the model, against what transformers itself loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fisher.models import ARCHITECTURES, MIXTURES, build, saved, settings
from tiny_models import State, edit
from transformers import AutoModelForCausalLM

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError
from streammerge.fisher import fisher
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.names import is_linear_weight, parameter_parts

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def assert_assembled(folder: Path) -> None:
    """Every parameter, put together from its parts, is bit for bit what `from_pretrained` loads."""
    live = AutoModelForCausalLM.from_pretrained(folder)
    with Checkpoint.open(folder) as base:
        parts = parameter_parts(live, base)
        used = [part.tensor.name for of_parameter in parts.values() for part in of_parameter]
        assert sorted(used) == sorted(base.tensors), "every tensor is in one place"
        expected = dict(live.named_parameters())
        assert set(parts) == set(expected)
        for name, of_parameter in parts.items():
            assembled = torch.full((expected[name].numel(),), torch.nan)
            for part in of_parameter:
                assembled[part.start : part.start + part.tensor.numel] = base.tensor(part.tensor.name).flatten()
            assert torch.equal(assembled.view_as(expected[name]), expected[name]), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_put_together_as_transformers_does(tmp_path: Path, kind: str, tied: bool) -> None:
    assert_assembled(saved(tmp_path / "model", kind, tied))


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_are_stored_stacked(tmp_path: Path, kind: str) -> None:
    build(kind).save_pretrained(tmp_path / "model", save_original_format=False)
    with Checkpoint.open(tmp_path / "model") as base:
        assert "model.layers.0.mlp.experts.gate_up_proj" in base.tensors
    assert_assembled(tmp_path / "model")


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Not in that of their names: 10 comes after 9."""
    folder = saved(tmp_path / "model", "mixtral", num_local_experts=11, num_hidden_layers=1)
    assert_assembled(folder)
    with Checkpoint.open(folder) as base:
        model = BlockModel(base, torch.float32, torch.device("cpu"))
        names = [part.tensor.name for part in model.parts["model.layers.0.mlp.experts.down_proj"]]
    assert names == [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(11)]


def test_a_tied_head_stored_a_second_time_is_left_alone(tmp_path: Path) -> None:
    """Some checkpoints hold the head though it is tied; transformers computes with the embedding."""
    folder = saved(tmp_path / "model", "llama", tied=True)
    edit(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    with Checkpoint.open(folder) as base:
        model = BlockModel(base, torch.float32, torch.device("cpu"))
    assert [part.tensor.name for part in model.parts["model.embed_tokens.weight"]] == ["model.embed_tokens.weight"]
    assert "lm_head.weight" not in model.tensor_names


Change = Callable[[State], object]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda state: state.pop(EXPERT),
            CheckpointError,
            r"tensors of some experts are missing: there are 4 \S*w1\S*, 3 \S*w3",
        ),
        (
            lambda state: [state.pop(name) for name in [*state] if "layers.1" in name and ".experts.3." in name],
            IncompatibleCheckpointsError,
            r"the 6 tensors of 'model.layers.1.mlp.experts.gate_up_proj' have 9216 elements, it needs 12288",
        ),
        (
            lambda state: state.update({EXPERT: state[EXPERT][1:].clone()}),
            IncompatibleCheckpointsError,
            r"the 8 tensors of 'model.layers.1.mlp.experts.gate_up_proj' have 12256 elements, it needs 12288",
        ),
        (
            lambda state: state.update({EXPERT: state[EXPERT].T}),  # as many elements
            IncompatibleCheckpointsError,
            r"experts.2.w3.weight' is \[32, 48\], as a part of 'model.layers.1.mlp.experts.gate_up_proj' \[4, 96, 32\]",
        ),
        (
            lambda state: state.update({EXPERT: state[EXPERT].bfloat16()}),
            IncompatibleCheckpointsError,
            r"the 8 tensors of 'model.layers.1.mlp.experts.gate_up_proj' are not all of one dtype",
        ),
        (
            lambda state: state.pop("model.layers.0.self_attn.q_proj.weight"),
            IncompatibleCheckpointsError,
            r"there is no tensor 'model.layers.0.self_attn.q_proj.weight' \[32, 32\]",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(31)}),
            IncompatibleCheckpointsError,
            r"tensor 'model.norm.weight' is \[31\], the model needs \[32\]",
        ),
        (
            lambda state: state.update({"model.layers.0.mlp.extra.weight": torch.ones(4, 4)}),
            CheckpointError,
            r"tensor 'model.layers.0.mlp.extra.weight' and 0 more are no parameters of MixtralForCausalLM",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: Change, error: type[Exception], message: str
) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    edit(folder, change)
    with pytest.raises(error, match=message) as caught:
        fisher(str(folder), tmp_path / "out", settings(), device="cpu")
    assert str(caught.value).startswith(f"model {folder}: ")


def test_every_mismatch_is_listed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    edit(folder, lambda state: (state.pop("model.norm.weight"), state.update({EXPERT: state[EXPERT].bfloat16()})))
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        fisher(str(folder), tmp_path / "out", settings(), device="cpu")
    assert len(caught.value.mismatches) == 2


def test_an_architecture_that_cuts_its_tensors_is_refused(tmp_path: Path) -> None:
    """HRM's files hold query, key and value in one matrix, which transformers cuts into its parameters."""
    folder = saved(tmp_path / "model", "hrm_text")
    with pytest.raises(CheckpointError, match=r"reshapes tensor 'model.\S+gqkv_proj.weight' and its like .*\(Chunk\)"):
        fisher(str(folder), tmp_path / "out", settings(), device="cpu")


def test_weights_of_plain_linear_layers(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    found = {name for name, _ in model.named_parameters() if is_linear_weight(model, name)}
    assert found == {
        *(f"model.layers.{block}.self_attn.{leaf}_proj.weight" for block in range(2) for leaf in "qkvo"),
        *(f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")),
    }
