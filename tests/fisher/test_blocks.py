"""The model that is built empty: what is loaded when, what it computes in pieces, and whom it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from fisher.models import ARCHITECTURES, SIZES, saved, settings
from tiny_models import edit_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError
from streammerge.fisher import fisher
from streammerge.fisher.blocks import BlockModel, first
from streammerge.fisher.feed import BlockFeed
from streammerge.fisher.phases import Phases
from streammerge.fisher.probes import random_tokens

CPU = torch.device("cpu")


def make(base: Checkpoint, dtype: torch.dtype = torch.float32) -> BlockModel:
    """The model with everything loaded but the blocks; every row of the embedding, so that ids are indices."""
    model = BlockModel(base, dtype, CPU)
    model.load_embedding_rows(torch.arange(model.vocab_size))
    model.load_outside({model.embedding, *model.names_of_head})
    model.load_head()
    return model


@pytest.fixture
def loaded(base: Checkpoint) -> BlockModel:
    return make(base)


def through_blocks(model: BlockModel, hidden: Tensor, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
    with BlockFeed(model.feed_blocks, range(len(model.blocks)), CPU, (), Phases()) as feed:
        for index, (args, kwargs) in enumerate(calls):
            hidden = first(model.install(*feed.take())(hidden, *args, **kwargs))
            model.remove(index)
    return hidden


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_replayed_block_by_block_it_is_the_same_model(tmp_path: Path, kind: str) -> None:
    ids = random_tokens(97, 2, 20, 0)
    folder = saved(tmp_path / "model", kind)
    live = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    with Checkpoint.open(folder) as base, torch.no_grad():
        model = make(base)
        recording = model.record(ids)
        hidden = through_blocks(model, recording.embedded, recording.calls)
        torch.testing.assert_close(model.logits(hidden), live(ids, use_cache=False).logits, rtol=0, atol=0)
        given = model.before_head(hidden)
        raw = live.lm_head(given)
        torch.testing.assert_close(model.after_head(raw), live(ids, use_cache=False).logits, rtol=0, atol=0)
        assert torch.equal(model.after_head(raw[0, :, 10:15]), model.after_head(raw)[0, :, 10:15])


def test_nothing_is_loaded_at_first(block_model: BlockModel) -> None:
    assert all(parameter.is_meta for parameter in block_model.model.parameters())


def test_the_rows_of_the_embedding_take_the_place_of_the_table(block_model: BlockModel, qwen2: Path) -> None:
    table = AutoModelForCausalLM.from_pretrained(qwen2).model.embed_tokens.weight
    ids = torch.tensor([3, 17, 96])
    block_model.load_embedding_rows(ids)
    block_model.load_outside({block_model.embedding})
    with torch.no_grad():
        embedded = block_model.record(torch.tensor([[2, 0, 1, 1]])).embedded
    assert torch.equal(embedded[0], table[[96, 3, 17, 17]])
    assert block_model.model.get_input_embeddings().weight.shape == (3, 32)


@pytest.mark.parametrize(("ids", "place"), [([0, 5], 0), ([5, 9], None)])
def test_the_padding_token_is_found_among_the_rows(block_model: BlockModel, ids: list[int], place: int | None) -> None:
    assert block_model.model.get_input_embeddings().padding_idx == 0
    block_model.load_embedding_rows(torch.tensor(ids))
    assert block_model.model.get_input_embeddings().padding_idx == place


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_installed_block_is_a_view_of_its_bytes(qwen2: Path, tmp_path: Path, compute: torch.dtype) -> None:
    """But for what is no linear layer and not in the dtype of the computation."""
    stored = AutoModelForCausalLM.from_pretrained(qwen2).bfloat16()
    stored.save_pretrained(tmp_path / "model")
    with Checkpoint.open(tmp_path / "model") as base:
        model = BlockModel(base, compute, CPU)
        with BlockFeed(model.feed_blocks, [0, 1, 2], CPU, (), Phases()) as feed:
            for index in range(3):
                _, raw = feed.take()
                assert model.install(index, raw) is model.blocks[index]
                inside = range(raw.data_ptr(), raw.data_ptr() + raw.numel())
                for name, parameter in model.parameters(index).items():
                    linear = name.endswith("proj.weight")
                    expected = stored.get_parameter(name)
                    assert parameter.dtype == (expected.dtype if linear else compute)
                    assert torch.equal(parameter, expected.to(parameter.dtype))
                    assert (parameter.data_ptr() in inside) is (parameter.dtype == torch.bfloat16)
                    assert not parameter.requires_grad
                model.remove(index)
                assert all(parameter.is_meta for parameter in model.parameters(index).values())


def test_every_parameter_is_in_one_block_or_outside(block_model: BlockModel) -> None:
    places = [*block_model.outside, *(name for index in range(3) for name in block_model.parameters(index))]
    assert sorted(places) == sorted(block_model.parts) == sorted(n for n, _ in block_model.model.named_parameters())
    assert block_model.prefix == "model.layers" and len(block_model.blocks) == 3
    assert block_model.outside == ["model.embed_tokens.weight", "model.norm.weight"]
    assert block_model.head == block_model.embedding == "model.embed_tokens.weight"
    assert block_model.names_of_head == {"model.embed_tokens.weight": "weight"}


def test_all_linear(block_model: BlockModel) -> None:
    matrices = {f"model.layers.{index}.mlp.up_proj.weight" for index in range(3)}
    assert block_model.all_linear(matrices)
    assert not block_model.all_linear({*matrices, "model.layers.1.input_layernorm.weight"})
    assert not block_model.all_linear({*matrices, "model.layers.2.self_attn.q_proj.bias"})


def test_blocks_that_are_skipped_or_fed_otherwise_are_refused(loaded: BlockModel) -> None:
    ids = random_tokens(97, 1, 8, 0)
    decoder = loaded.model.model
    decoder.config.num_hidden_layers = 2
    with pytest.raises(CheckpointError, match="only 2 of 3 blocks are called"):
        loaded.record(ids)
    decoder.config.num_hidden_layers = 3
    plain = decoder.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        hidden = decoder.embed_tokens(kwargs["input_ids"])
        for block in decoder.layers:
            hidden = block(hidden) + 1
        return hidden

    decoder.forward = changed
    with pytest.raises(CheckpointError, match="block 1 is not called once, on the output of the one before"):
        loaded.record(ids)
    decoder.forward = plain
    assert len(loaded.record(ids).calls) == 3


def test_blocks_in_another_order_are_refused(loaded: BlockModel) -> None:
    decoder = loaded.model.model

    def backwards(*args: Any, **kwargs: Any) -> Any:
        hidden = decoder.embed_tokens(kwargs["input_ids"])
        for block in reversed(decoder.layers):
            hidden = block(hidden)
        return hidden

    decoder.forward = backwards
    with pytest.raises(CheckpointError, match="Qwen2ForCausalLM cannot be walked block by block: block 2 is not"):
        loaded.record(random_tokens(97, 1, 8, 0))


def test_blocks_that_share_a_cache_are_refused(loaded: BlockModel) -> None:
    decoder = loaded.model.model
    plain = decoder.forward
    decoder.forward = lambda **kwargs: plain(**{**kwargs, "use_cache": True})
    with pytest.raises(CheckpointError, match="shares state with others through past_key_values"):
        loaded.record(random_tokens(97, 1, 8, 0))


def test_state_from_the_block_before_is_refused(loaded: BlockModel) -> None:
    """Each block is given something made of the first one's output, besides the hidden states."""
    decoder = loaded.model.model

    def changed(*args: Any, **kwargs: Any) -> Any:
        hidden = early = decoder.embed_tokens(kwargs["input_ids"])
        for number, block in enumerate(decoder.layers):
            hidden = block(hidden, early=early if number > 1 else None)
            early = 2 * hidden if number == 0 else early
        return hidden

    decoder.forward = changed
    with pytest.raises(CheckpointError, match="block 2 shares state with others through early"):
        loaded.record(random_tokens(97, 1, 8, 0))


def test_recording_leaves_the_blocks_as_they_were(loaded: BlockModel) -> None:
    before = [block.forward for block in loaded.blocks]
    loaded.record(random_tokens(97, 1, 8, 0))
    loaded.after_head(torch.zeros(2, 5))
    assert [block.forward for block in loaded.blocks] == before
    assert "forward" not in vars(loaded.model.get_output_embeddings())


def test_a_head_that_is_called_twice_is_refused(loaded: BlockModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type(loaded.model).forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded.model), "forward", twice)
    with pytest.raises(CheckpointError, match="its head is called 2 times"):
        loaded.before_head(torch.zeros(1, 4, 32))


@pytest.fixture
def spoilt(qwen2: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(copytree(qwen2, tmp_path / "model"))
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", tied=False)
    edit_config(folder, intermediate_size=64, num_hidden_layers=3)
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        fisher(str(folder), tmp_path / "out", settings(), device="cpu")
    assert "no tensor 'model.layers.2.mlp.up_proj.weight'" in str(caught.value)
    assert "tensor 'model.layers.0.mlp.up_proj.weight' is [48, 32], the model needs [64, 32]" in str(caught.value)


def test_fewer_blocks_than_the_files_hold_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.\S+ and \d+ more are no parameters of Llama"):
        fisher(str(folder), tmp_path / "out", settings(), device="cpu")


def test_a_config_that_transformers_refuses_is_one_line(spoilt: Path, tmp_path: Path) -> None:
    edit_config(spoilt, num_hidden_layers=4)  # its layer_types are three
    with pytest.raises(CheckpointError, match=r"^model .* cannot build it as a causal language model: [^\n]+$"):
        fisher(str(spoilt), tmp_path / "out", settings(), device="cpu")


def test_an_unknown_architecture_is_refused(spoilt: Path, tmp_path: Path) -> None:
    edit_config(spoilt, **SIZES, model_type="not_a_model")
    with pytest.raises(CheckpointError, match=r"cannot build it as a causal language model"):
        fisher(str(spoilt), tmp_path / "out", settings(), device="cpu")


def test_blocks_and_a_head_of_other_names_are_found(tmp_path: Path) -> None:
    with Checkpoint.open(saved(tmp_path / "model", "gpt_neox", tied=False, rotary_pct=0.5)) as base:
        model = BlockModel(base, torch.float32, CPU)
    assert model.prefix == "gpt_neox.layers" and model.embedding == "gpt_neox.embed_in.weight"
    assert model.head == "lm_head.weight" and model.parts["lm_head.weight"][0].tensor.name == "embed_out.weight"
