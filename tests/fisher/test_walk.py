"""The block walk against whole-model autograd: values, names, and how much is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from naive import naive_fisher
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError
from streammerge.fisher import blocks, fisher
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.probes import random_tokens
from streammerge.fisher.store import FisherSettings

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "phi3": {},
}


def build(kind: str, tied: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, **ARCHITECTURES[kind], "tie_word_embeddings": tied, **changes}
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def settings(**values: Any) -> FisherSettings:
    return FisherSettings.model_validate({"dtype": "float32", **values})


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("qwen2", tied=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_textbook_loop(tmp_path: Path, kind: str, tied: bool) -> None:
    model = build(kind, tied)
    model.save_pretrained(tmp_path / "model")
    record = fisher(str(tmp_path / "model"), tmp_path / "out", settings(all_parameters=True), device="cpu")
    expected, loss = naive_fisher(model)
    found = load(tmp_path / "out")
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert (found[name] - values).norm() <= 1e-5 * values.norm(), name
        assert record.tensors[name].mean == pytest.approx(values.double().mean().item(), rel=1e-5)
    assert record.loss == pytest.approx(loss, rel=1e-6)


def test_by_default_it_holds_the_matrices_of_the_blocks_in_bfloat16(saved: Path, tmp_path: Path) -> None:
    fisher(str(saved), tmp_path / "default", device="cpu")
    fisher(str(saved), tmp_path / "full", settings(all_parameters=True), device="cpu")
    default, full = load(tmp_path / "default"), load(tmp_path / "full")
    assert set(default) == {name for name, t in full.items() if ".layers." in name and t.dim() == 2}
    assert all(torch.equal(values, full[name].bfloat16()) for name, values in default.items())
    with Checkpoint.open(saved) as base:
        assert all(default[name].shape == base.tensors[name].shape for name in default)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.02)])
def test_half_precision_stays_close(tmp_path: Path, dtype: str, tolerance: float) -> None:
    model = build("qwen2", True)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    fisher(str(tmp_path / "model"), tmp_path / "half", settings(), device="cpu")
    fisher(str(tmp_path / "model"), tmp_path / "full", settings(compute_dtype="float32"), device="cpu")
    half, full = load(tmp_path / "half"), load(tmp_path / "full")
    for name, values in full.items():
        assert not torch.equal(half[name], values)
        assert (half[name] - values).norm() <= tolerance * values.norm(), name


def test_the_samples_are_one_seeded_draw() -> None:
    ids = random_tokens(1000, 8, 64, 42)
    assert torch.equal(ids, torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(42)))
    assert ids.dtype == torch.int64
    assert not torch.equal(ids, random_tokens(1000, 8, 64, 43))


def test_settings_change_the_samples(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    fisher(str(saved), tmp_path / "out", settings(samples=3, length=9, seed=7), device="cpu")
    expected, _ = naive_fisher(model, samples=3, length=9, seed=7)
    for name, values in load(tmp_path / "out").items():
        assert (values - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_one_block_is_in_memory_and_each_is_read_twice(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[str, int] = {}
    loaded: list[int] = []
    plain_read, plain_set = Checkpoint.read_into, blocks.set_module_tensor_to_device

    def counted(self: Checkpoint, info: Any, start: int, buffer: memoryview) -> None:
        if self.folder == saved and len(buffer) == info.nbytes:
            reads[info.name] = reads.get(info.name, 0) + 1
        plain_read(self, info, start, buffer)

    def watched(module: Any, name: str, device: Any, *args: Any, **kwargs: Any) -> None:
        plain_set(module, name, device, *args, **kwargs)
        loaded.append(sum(any(not p.is_meta for p in block.parameters()) for block in module.model.layers))

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    monkeypatch.setattr(blocks, "set_module_tensor_to_device", watched)
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: "")
    fisher(str(saved), tmp_path / "out", settings(), device="cpu")
    assert max(loaded) == 1
    assert {name: count for name, count in reads.items() if ".layers." in name} == {
        name: 2 for name in load(saved) if ".layers." in name
    }
    assert all(count == 1 for name, count in reads.items() if ".layers." not in name)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_non_finite_weight_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    state = load(saved)
    state[name].view(-1)[0] = torch.inf
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.*1 non-finite"):
        fisher(str(saved), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_overflow_names_block_and_sequence(tmp_path: Path) -> None:
    model = build("llama", False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    model.half().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"decoder block 1 is not finite in sequence 0.*--fisher-compute-dtype"):
        fisher(str(tmp_path / "model"), tmp_path / "out", device="cpu")


def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama", tied=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64, "num_hidden_layers": 4}))
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        fisher(str(folder), tmp_path / "out", device="cpu")
    assert "no tensor 'model.layers.3.mlp.up_proj.weight'" in str(caught.value)
    assert "tensor 'model.layers.0.mlp.up_proj.weight' is [48, 32], the model needs [64, 32]" in str(caught.value)


def test_a_config_that_transformers_refuses_is_one_line(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"^model .* cannot build it as a causal language model: [^\n]+$"):
        fisher(str(saved), tmp_path / "out", device="cpu")


def test_an_unknown_architecture_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "not_a_model", **SIZES}))
    with pytest.raises(CheckpointError, match=r"cannot build it as a causal language model"):
        fisher(str(saved), tmp_path / "out", device="cpu")


def test_remote_code_is_not_run(saved: Path, tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, **SIZES}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(CheckpointError):
        fisher(str(saved), tmp_path / "out", device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def block_model(saved: Path) -> Iterator[BlockModel]:
    with Checkpoint.open(saved) as base:
        model = BlockModel(base, torch.float32, torch.device("cpu"))
        model.load_resident()
        yield model


def test_blocks_that_are_skipped_or_fed_otherwise_are_refused(block_model: BlockModel) -> None:
    ids = random_tokens(97, 1, 8, 0)
    decoder = block_model.model.model
    decoder.config.num_hidden_layers = 2
    with pytest.raises(CheckpointError, match="only 2 of 3 blocks are called"), torch.no_grad():
        block_model.record(ids)
    decoder.config.num_hidden_layers = 3
    plain = decoder.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        hidden = decoder.embed_tokens(kwargs["input_ids"])
        for block in decoder.layers:
            hidden = block(hidden) + 1
        return hidden

    decoder.forward = changed
    with pytest.raises(CheckpointError, match="block 1 is not called once, on the output of the one before"):
        block_model.record(ids)
    decoder.forward = plain
    assert len(block_model.record(ids).calls) == 3


def test_blocks_that_share_a_cache_are_refused(block_model: BlockModel) -> None:
    decoder = block_model.model.model
    plain = decoder.forward
    decoder.forward = lambda **kwargs: plain(**{**kwargs, "use_cache": True})
    with pytest.raises(CheckpointError, match="shares state with others through past_key_values"):
        block_model.record(random_tokens(97, 1, 8, 0))


def test_recording_leaves_the_blocks_as_they_were(block_model: BlockModel) -> None:
    before = [block.forward for block in block_model.blocks]
    block_model.record(random_tokens(97, 1, 8, 0))
    assert [block.forward for block in block_model.blocks] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu(saved: Path, tmp_path: Path) -> None:
    streammerge.fisher(str(saved), tmp_path / "cpu", settings(all_parameters=True), device="cpu")
    streammerge.fisher(str(saved), tmp_path / "gpu", settings(all_parameters=True), device="cuda")
    expected = load(tmp_path / "cpu")
    for name, values in load(tmp_path / "gpu").items():
        assert (values - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
