"""Models that cannot be walked, by name; and code that a model brings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any, NoReturn

import pytest
import torch
import transformers
from fisher.models import assert_close, saved, settings
from naive import naive_fisher
from safetensors.torch import save_file
from tiny_models import edit, edit_config, put, tensors
from transformers import AutoModelForCausalLM

from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher import fisher

GEMMA3N = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "laurel_rank": 4,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
    "intermediate_size": [48] * 5,
    "activation_sparsity_pattern": [0.0] * 5,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Asserts that there is no Fisher of a folder, in one line that names it and nothing else is left; that line."""

    def call(folder: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
        with pytest.raises(error) as caught:
            fisher(str(folder), tmp_path / "out", settings(), device="cpu", **options)
        message = str(caught.value)
        assert message.startswith(f"model {folder}") and "\n" not in message
        assert not (tmp_path / "out").exists()
        return message

    return call


# ---- Models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder(tmp_path: Path, refused: Refused, kind: str) -> None:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 97}
    ends = {f"{end}_{key}": n for end in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))}
    config = transformers.AutoConfig.for_model(kind, **sizes, **(ends if kind == "bart" else {}))
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "model")
    assert "an encoder-decoder: only decoders have this Fisher" in refused(tmp_path / "model")


def test_state_that_blocks_share(tmp_path: Path, refused: Refused) -> None:
    """The later blocks of Gemma 3n take keys and values of earlier ones."""
    message = refused(saved(tmp_path / "model", "gemma3n_text", **GEMMA3N))
    assert "Gemma3nForCausalLM cannot be walked block by block: block 0 shares state with others through" in message


def test_an_encoder(tmp_path: Path, refused: Refused) -> None:
    config = transformers.AutoConfig.for_model("vit", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads = 4
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    assert "cannot build it as a causal language model" in refused(tmp_path / "model")


@pytest.mark.parametrize("name", ["qweight", "weight_scale", "weight_packed", "absmax"])
def test_packed_weights(qwen2: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    put(folder, f"model.layers.0.mlp.up_proj.{name}", torch.ones(4, 4, dtype=torch.int32))
    message = refused(folder)
    assert f"'model.layers.0.mlp.up_proj.{name}'" in message and "dequantise" in message


def test_a_config_that_says_quantised(qwen2: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised (gptq)" in refused(folder)


def test_integers(qwen2: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    save_file({name: values.to(torch.int8) for name, values in tensors(folder).items()}, folder / "model.safetensors")
    assert "it has no floating tensor" in refused(folder)


def test_matrices_that_are_no_parameters(qwen2: Path, tmp_path: Path, refused: Refused) -> None:
    """As LoRA factors left in the files."""
    folder = Path(copytree(qwen2, tmp_path / "model"))
    edit(folder, lambda state: state.update({f"model.layers.0.mlp.lora_{ab}": torch.ones(2, 2) for ab in "AB"}))
    assert "'model.layers.0.mlp.lora_A' and 1 more are no parameters of Qwen2ForCausalLM" in refused(folder)


# ---- Code that a model brings ---------------------------------------------------------------------------------------

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

open({ran!r}, "w").close()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = torch.nn.Tanh()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with code of its own: another activation, scaled logits. `tmp_path / "ran"` tells that it was run."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = saved(tmp_path / "model", "llama", False)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit_config(
        folder, model_type="mine", architectures=["MineForCausalLM"], auto_map=auto_map, _name_or_path="not/here"
    )
    (folder / "mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return folder


def test_code_is_not_run_unasked(mine: Path, tmp_path: Path, refused: Refused) -> None:
    assert "it brings its own code, which only runs with --trust-remote-code" in refused(mine)
    assert not (tmp_path / "ran").exists()


def test_code_is_run_when_asked(mine: Path, tmp_path: Path) -> None:
    fisher(str(mine), tmp_path / "out", settings(all_parameters=True), device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    live = AutoModelForCausalLM.from_pretrained(mine, trust_remote_code=True)
    expected, _ = naive_fisher(live, 4, 20)
    found = tensors(tmp_path / "out")
    assert set(found) == set(expected)
    assert_close(found, expected)
    plain, _ = naive_fisher(transformers.LlamaForCausalLM.from_pretrained(mine), 4, 20)
    with pytest.raises(AssertionError):
        assert_close(found, plain, 0.1)


def test_code_of_another_repository_is_refused(mine: Path, tmp_path: Path, refused: Refused) -> None:
    edit_config(mine, auto_map={"AutoModelForCausalLM": "somebody/else--mine.MineForCausalLM"})
    assert "takes code from another repository, which is not pinned" in refused(mine, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_code_that_fails_is_one_line(mine: Path, tmp_path: Path, refused: Refused) -> None:
    (mine / "mine.py").write_text("raise RuntimeError('first\\nsecond')")
    message = refused(mine, trust_remote_code=True)
    assert "cannot build it as a causal language model: first second" in message and "only runs with" not in message


@pytest.mark.parametrize("name", ["org/model", "org/model@main", "hf://org/model", f"org/model@{COMMIT[:12]}"])
def test_code_from_the_hub_must_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[str] = []

    def find(repository: str, *options: object) -> NoReturn:
        asked.append(repository)
        raise OSError("no network in a test")

    monkeypatch.setattr("streammerge.checkpoints.locate.hub_files", find)
    with pytest.raises(RecipeError, match="--trust-remote-code: pin org/model.* to the commit you have read"):
        fisher(name, tmp_path / "out", settings(), device="cpu", trust_remote_code=True)
    assert not asked, "before the Hub is asked"
    for pinned, trust in ((f"org/model@{COMMIT}", True), (f"hf://org/model@{COMMIT}", True), (name, False)):
        with pytest.raises(OSError, match="no network in a test"):
            fisher(pinned, tmp_path / "out", settings(), device="cpu", trust_remote_code=trust)
    assert asked == ["org/model"] * 3


def test_an_auto_map_that_is_no_map(qwen2: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    edit_config(folder, auto_map=["else--mine.MineForCausalLM"])
    assert "takes code from another repository" in refused(folder, trust_remote_code=True)
