"""The block walk against whole-model autograd: values under the names of the files, for every architecture."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from fisher.models import ARCHITECTURES, MIXTURES, assert_close, build, settings, textbook
from tiny_models import edit, tensors
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError
from streammerge.fisher import fisher, linear, walk


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_the_textbook_loop(tmp_path: Path, kind: str, tied: bool) -> None:
    model = build(kind, tied)
    model.save_pretrained(tmp_path / "model")
    assert ("lm_head.weight" in tensors(tmp_path / "model")) is not tied
    expected, loss = textbook(model)

    record = fisher(str(tmp_path / "model"), tmp_path / "all", settings(all_parameters=True), device="cpu")
    found = tensors(tmp_path / "all")
    assert set(found) == set(tensors(tmp_path / "model"))
    assert_close(found, expected)
    for name, values in found.items():
        assert values.shape == expected[name].shape and expected[name].count_nonzero()
        assert record.tensors[name].mean == pytest.approx(expected[name].double().mean().item(), rel=1e-5)
        assert record.tensors[name].max == pytest.approx(expected[name].max().item(), rel=1e-5)
    assert record.loss == pytest.approx(loss, rel=1e-6)

    fisher(str(tmp_path / "model"), tmp_path / "matrices", settings(samples=8), device="cpu")  # eight at a time
    found, (expected, _) = tensors(tmp_path / "matrices"), textbook(model, samples=8)
    assert set(found) == {name for name, t in expected.items() if ".layers." in name and t.dim() > 1}
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_bfloat16_stays_close(tmp_path: Path, kind: str) -> None:
    """To the textbook in float32, on the same weights. With every expert in use: rounding may choose another one."""
    every = {"num_experts_per_tok": 4} if kind in MIXTURES else {}
    model = build(kind, noise=0.1, **every).bfloat16()
    model.save_pretrained(tmp_path / "model")
    fisher(str(tmp_path / "model"), tmp_path / "out", settings(all_parameters=True), device="cpu")
    found, (expected, _) = tensors(tmp_path / "out"), textbook(model.float())
    assert_close(found, expected, 0.05)
    assert not any(torch.equal(values, expected[name]) for name, values in found.items())


def test_float16_stays_close(tmp_path: Path) -> None:
    model = build("qwen2", False).half()
    model.save_pretrained(tmp_path / "model")
    fisher(str(tmp_path / "model"), tmp_path / "out", settings(), device="cpu")
    assert_close(tensors(tmp_path / "out"), textbook(model.float())[0], 0.01)


def test_the_compute_dtype_is_the_one_asked_for(qwen2: Path, tmp_path: Path) -> None:
    fisher(str(qwen2), tmp_path / "double", settings(compute_dtype="float64", all_parameters=True), device="cpu")
    fisher(str(qwen2), tmp_path / "half", settings(compute_dtype="bfloat16"), device="cpu")
    expected, _ = textbook(AutoModelForCausalLM.from_pretrained(qwen2))
    assert_close(tensors(tmp_path / "double"), expected)
    with pytest.raises(AssertionError):
        assert_close(tensors(tmp_path / "half"), expected, 1e-4)


def test_by_default_it_is_stored_in_bfloat16(qwen2: Path, tmp_path: Path) -> None:
    fisher(str(qwen2), tmp_path / "default", settings(dtype=None), device="cpu")
    fisher(str(qwen2), tmp_path / "full", settings(), device="cpu")
    default, full = tensors(tmp_path / "default"), tensors(tmp_path / "full")
    assert set(default) == set(full)
    assert all(torch.equal(values, full[name].bfloat16()) for name, values in default.items())


@pytest.mark.parametrize("values", [{"samples": 3, "length": 9, "seed": 7}, {"samples": 1, "length": 2}])
def test_settings_change_the_samples(qwen2: Path, tmp_path: Path, values: dict[str, int]) -> None:
    fisher(str(qwen2), tmp_path / "out", settings(**values), device="cpu")
    expected, _ = textbook(AutoModelForCausalLM.from_pretrained(qwen2), **values)
    assert_close(tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("together", [1, 3, 5])
@pytest.mark.parametrize("everything", [True, False])
def test_groups_of_any_size(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, everything: bool
) -> None:
    """Five sequences of seven tokens; the last group may be smaller."""
    monkeypatch.setattr(walk, "GROUP_TOKENS", together * 7 + 6)
    made = settings(samples=5, length=7, all_parameters=everything)
    fisher(str(qwen2), tmp_path / "out", made, device="cpu")
    expected, _ = textbook(AutoModelForCausalLM.from_pretrained(qwen2), 5, 7)
    assert_close(tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_no_token_reached(tmp_path: Path, kind: str) -> None:
    """Two of u.x, -u.x, v.x, -v.x are positive, so the two best are never the third expert, whose row is zero."""
    count = {"num_local_experts": 5} if kind == "mixtral" else {"num_experts": 5}
    model = build(kind, **count)
    router = model.model.layers[0].mlp.gate.weight.data
    router[1], router[2], router[4] = -router[0], 0, -router[3]
    model.save_pretrained(tmp_path / "model")
    expected, _ = textbook(model)
    gate, up, down = MIXTURES[kind]
    pattern = f"model.layers.0.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.experts.{{}}.{{}}.weight"
    for leaf in (gate, up, down):
        assert not expected[pattern.format(2, leaf)].any(), "the test builds what it says"
        reached = torch.stack([expected[pattern.format(expert, leaf)] for expert in (0, 1, 3, 4)])
        assert all(values.any() for values in reached)
        expected[pattern.format(2, leaf)].fill_(reached.double().mean())

    for everything in (True, False):
        out = tmp_path / f"out-{everything}"
        record = fisher(str(tmp_path / "model"), out, settings(all_parameters=everything), device="cpu")
        assert_close(tensors(out), expected)
        unreached = {pattern.format(2, leaf) for leaf in (gate, up, down)}
        assert set(record.unreached) == unreached
        (note,) = record.notes
        assert note.startswith("3 tensors of experts were reached by no token") and record.unreached[0] in note


def test_blocks_that_mix_their_sequences_go_one_at_a_time(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mixture whose experts are plain linear layers: they see the tokens that chose them, of any sequence."""
    together: list[int] = []
    plain_group, plain_mlp = linear.LinearFunctions.group, Qwen2MLP.forward

    def group(self: Any, sequences: int, tokens: int) -> Any:
        together.append(sequences)
        return plain_group(self, sequences, tokens)

    def some_tokens(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[..., 0] > 0
        return hidden.index_put((chosen,), plain_mlp(self, hidden[chosen]))

    monkeypatch.setattr(linear.LinearFunctions, "group", group)
    fisher(str(qwen2), tmp_path / "plain", settings(), device="cpu")
    assert set(together) == {4}
    monkeypatch.setattr(Qwen2MLP, "forward", some_tokens)
    together.clear()
    fisher(str(qwen2), tmp_path / "mixed", settings(), device="cpu")
    assert together == [4, *[1] * (4 * 2 * 3)], "tried once, then given up"
    assert_close(tensors(tmp_path / "mixed"), textbook(AutoModelForCausalLM.from_pretrained(qwen2))[0])


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_non_finite_weight_is_named(qwen2: Path, tmp_path: Path, name: str, value: float) -> None:
    folder = Path(copytree(qwen2, tmp_path / "model"))
    edit(folder, lambda state: state[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{name}.*1 non-finite"):
        fisher(str(folder), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_non_finite_row_is_named(tmp_path: Path, name: str) -> None:
    build("llama", False).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", lambda state: state[name].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=rf"{name}.* non-finite"):
        fisher(str(tmp_path / "model"), tmp_path / "out", settings(), device="cpu")


def test_an_overflow_names_block_and_sequence(tmp_path: Path) -> None:
    model = build("llama", False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    model.half().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"decoder block 1 is not finite in sequence 0.*--fisher-compute-dtype"):
        fisher(str(tmp_path / "model"), tmp_path / "out", device="cpu")


def test_a_gradient_that_overflows_names_the_sequence(qwen2: Path, tmp_path: Path) -> None:
    """Sequence 2 alone holds token 5, whose embedding is so small that the norm's gradient overflows half precision."""
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    ids = torch.randint(0, 97, (4, 6), generator=torch.Generator().manual_seed(42))
    token = next(t for t in ids[2].tolist() if not (ids[[0, 1, 3]] == t).any())
    with torch.no_grad():
        model.model.embed_tokens.weight[token] *= 1e-7
        for block in model.model.layers:
            block.input_layernorm.weight.mul_(30)
    with Checkpoint.open(qwen2) as base:
        assert base.config["rms_norm_eps"] < 1e-5
    model.half().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"gradient at decoder block \d is not finite in sequence 2"):
        fisher(str(tmp_path / "model"), tmp_path / "out", settings(samples=4, length=6), device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_the_gpu_agrees_with_the_cpu(tmp_path: Path, kind: str) -> None:
    build(kind).save_pretrained(tmp_path / "model")
    fisher(str(tmp_path / "model"), tmp_path / "cpu", settings(all_parameters=True), device="cpu")
    fisher(str(tmp_path / "model"), tmp_path / "gpu", settings(all_parameters=True), device="cuda")
    assert_close(tensors(tmp_path / "gpu"), tensors(tmp_path / "cpu"), 1e-4)
