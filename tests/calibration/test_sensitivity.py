"""Sensitivities against plain autograd and whole logits of the live models, in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import build
from tiny_models import WEIGHTS, Models, Run, give_tokenizer, tensors
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from streammerge.calibration import CalibrationSettings, calibrate, calibration_cost, measure, sensitivity
from streammerge.calibration.lockstep import Lockstep
from streammerge.calibration.sensitivity import (
    LogitDistances,
    WeightedGradients,
    block_sensitivities,
    measure_sensitivity,
    sensitivity_steps,
)
from streammerge.calibration.texts import calibration_tokens
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.source import LocalFile
from streammerge.errors import CheckpointError
from streammerge.fisher import head, linear
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.phases import Phases
from streammerge.fisher.placement import FisherRun
from streammerge.workers import Workers

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {},
    # a convolution in a block: its matrix is no linear function's
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
}


def token_ids(samples: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (samples, length), generator=torch.Generator().manual_seed(seed))


def noisy(model: Any, seed: int, tied: bool | None = None) -> Any:
    """A fine-tune of the model, with a head of its own or none."""
    generator = torch.Generator().manual_seed(seed)
    made = copy.deepcopy(model)
    if tied is False and model.config.tie_word_embeddings:
        made.config.tie_word_embeddings = False
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def wide(model: Any) -> Any:
    """A copy in float64; torch's grouped products of experts know no such thing."""
    made = copy.deepcopy(model).double()
    made.set_experts_implementation("eager")
    return made


def autograd(model: Any, ids: Tensor) -> dict[int, float]:
    """The mean over the sequences of sum |w dL/dw| over each block's matrices, from whole gradients in float64."""
    live = wide(model)
    found: dict[int, list[float]] = {}
    for row in ids:
        live.zero_grad()
        logits = live(row[None], use_cache=False).logits[0]
        functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        for name, parameter in live.named_parameters():
            if ".layers." in name and parameter.dim() > 1 and parameter.grad is not None:
                total = (parameter * parameter.grad).abs().sum().item()
                found.setdefault(int(name.split(".")[2]), []).append(total / len(ids))
    return {block: sum(found[block]) for block in sorted(found)}


def whole_logits(model: Any, ids: Tensor) -> Tensor:
    """[tokens, vocabulary], float64."""
    with torch.no_grad():
        return wide(model)(ids, use_cache=False).logits.flatten(0, 1)


class Saved:
    """Live models on disk, open, as they are walked."""

    def __init__(
        self, folder: Path, models: Sequence[Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.folder, self.opened = folder, []
        for number, model in enumerate(models):
            model.save_pretrained(folder / str(number))
            self.opened.append(Checkpoint.open(folder / str(number)))
        self.models = [BlockModel(checkpoint, dtype, torch.device(device)) for checkpoint in self.opened]

    def blocks(self, ids: Tensor, workers: Workers, number: int = 0) -> dict[int, float]:
        folder = self.folder / "walk"
        found = block_sensitivities(self.models[number], ids, folder, workers, lambda steps: None, Phases())
        assert not folder.exists()
        return found

    def distances(self, ids: Tensor, workers: Workers, owners: Sequence[int]) -> dict[tuple[int, int], float]:
        observer = LogitDistances(self.models, owners, workers, Phases())
        Lockstep(self.models, ids, [observer], workers).run()
        return observer.found

    def close(self) -> None:
        for checkpoint in self.opened:
            checkpoint.close()


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Any]:
    made: list[Saved] = []

    def save(models: Sequence[Any], dtype: torch.dtype = torch.float32) -> Saved:
        made.append(Saved(tmp_path / f"saved{len(made)}", models, dtype))
        return made[-1]

    yield save
    for one in made:
        one.close()


@pytest.fixture
def one() -> Iterator[Workers]:
    with Workers(1) as workers:
        yield workers


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tiny models are cut up in every way."""
    monkeypatch.setattr(linear, "_SQUARES", {"cpu": (5, 7)})
    monkeypatch.setattr(linear, "_TILE", 256)
    monkeypatch.setattr(head, "head_rows", lambda row_bytes, tokens: 1024 // row_bytes)
    monkeypatch.setattr(sensitivity, "_PIECE", 50)
    monkeypatch.setattr(sensitivity, "_TOKENS", 7)


# ---- |w dL/dw| ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 2e-7)])
def test_sensitivities_are_those_of_autograd(
    saved: Any, one: Workers, kind: str, tied: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(kind, tied, **KINDS[kind])
    ids = token_ids()
    found = saved([model], dtype).blocks(ids, one)
    expected = autograd(model, ids)
    assert list(found) == [0, 1] == list(expected)
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.usefixtures("small_pieces")
def test_several_groups_and_pieces(saved: Any, one: Workers) -> None:
    """600 tokens, more than go through a block together; tiles that fit nowhere."""
    model, ids = build("llama", False), token_ids(30)
    assert saved([model]).blocks(ids, one) == pytest.approx(autograd(model, ids), rel=2e-5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_the_number_of_workers_changes_nothing(saved: Any, one: Workers, kind: str) -> None:
    pair, ids = saved([build(kind), noisy(build(kind), 1)]), token_ids()
    blocks, distances = pair.blocks(ids, one), pair.distances(ids, one, [0, 1])
    with Workers(3) as workers:
        assert pair.blocks(ids, workers) == blocks
        assert pair.distances(ids, workers, [0, 1]) == distances


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_bfloat16_stays_close(saved: Any, one: Workers, kind: str) -> None:
    """With every expert in use: rounding may choose another one."""
    every = {"num_experts_per_tok": 4} if kind == "mixtral" else {}
    model, ids = build(kind, noise=0.1, **every).bfloat16(), token_ids()
    found, expected = saved([model], torch.bfloat16).blocks(ids, one), autograd(model, ids)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != pytest.approx(expected, rel=1e-6)


def test_what_an_interrupted_walk_left_is_not_gone_on_with(
    saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of the blocks it had finished are lost with it."""
    model, ids = saved([build("qwen2")]), token_ids()
    expected = model.blocks(ids, one)
    plain = WeightedGradients.finish

    def stop_at_block_0(self: Any, parameters: Any, *rest: Any) -> None:
        if any(".layers.0." in name for name in parameters):
            raise KeyboardInterrupt
        plain(self, parameters, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WeightedGradients, "finish", stop_at_block_0)
        with pytest.raises(KeyboardInterrupt):
            model.blocks(ids, one)
    assert (model.folder / "walk").exists()
    assert model.blocks(ids, one) == expected


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:  # no view
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.usefixtures("small_pieces")
def test_no_gradient_is_ever_whole(saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, largest = WeightedGradients.take, Largest()

    def watched(self: Any, *rest: Any) -> None:
        with largest:
            plain(self, *rest)

    monkeypatch.setattr(WeightedGradients, "take", watched)
    saved([build("qwen2")]).blocks(token_ids(1, 4), one)
    assert 0 < largest.elements < 16 * 32  # the smallest matrix


@pytest.mark.parametrize(
    ("samples", "length", "words"), [(3, 20, "also used in another way"), (1, 600, "and in another way")]
)
def test_a_weight_in_two_roles_is_refused_by_name(
    saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch, samples: int, length: int, words: str
) -> None:
    plain = Qwen2MLP.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return plain(self, x) + 1e-3 * self.up_proj.weight.mean(0)

    monkeypatch.setattr(Qwen2MLP, "forward", forward)
    with pytest.raises(CheckpointError, match=rf"'model.layers.1.mlp.up_proj.weight'.* {words}"):
        saved([build("qwen2")]).blocks(token_ids(samples, length), one)


def test_a_gradient_that_is_not_finite(saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: plain(self, x).square().sqrt())  # at 0, NaN
    model = build("qwen2")
    for block in model.model.layers:
        nn.init.zeros_(block.mlp.down_proj.weight)
    with pytest.raises(CheckpointError, match="not finite .*--calibration-compute-dtype float32"):
        saved([model]).blocks(token_ids(), one)


# ---- distances of logits --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("tied", [(True, True, True), (True, False, True), (False, False, False)], ids=str)
def test_distances_are_those_of_whole_logits(
    saved: Any, one: Workers, kind: str, tied: tuple[bool, bool, bool]
) -> None:
    base = build(kind, tied[0])
    live = [base, noisy(base, 1, tied[1]), noisy(base, 2, tied[2])]
    ids = token_ids()
    trio = saved(live)
    assert [model.head == model.embedding for model in trio.models] == list(tied)
    logits = [whole_logits(model, ids) for model in live]
    expected = {(i, j): (logits[i] - logits[j]).norm(dim=1).mean().item() for i in range(3) for j in range(3)}
    found = trio.distances(ids, one, [0, 1, 2])
    assert found == pytest.approx({pair: expected[pair] for pair in expected if pair[0] != pair[1]}, rel=1e-5)
    assert trio.distances(ids, one, [1]) == {(0, 1): found[0, 1], (2, 1): found[2, 1]}


@pytest.mark.usefixtures("small_pieces")
def test_heads_stored_in_different_dtypes_go_in_step(saved: Any, one: Workers) -> None:
    base = build("qwen2", False)
    live, ids = [base, noisy(base, 1), noisy(base, 2)], token_ids()
    for model, dtype in zip(live, (torch.float32, torch.float64, torch.bfloat16), strict=True):
        for parameter in model.parameters():  # and not the buffers, which nobody stores
            parameter.data = parameter.data.to(dtype)
    found = saved(live, torch.float64).distances(ids, one, [0, 1, 2])
    logits = [whole_logits(model, ids) for model in live]
    expected = {(i, j): (logits[i] - logits[j]).norm(dim=1).mean().item() for i in range(3) for j in range(3) if i != j}
    assert found == pytest.approx(expected, rel=1e-5)


def test_equal_models_are_at_no_distance(saved: Any, one: Workers) -> None:
    model = build("qwen2")
    assert saved([model, model]).distances(token_ids(), one, [0, 1]) == {(0, 1): 0.0, (1, 0): 0.0}


@pytest.mark.usefixtures("small_pieces")
def test_no_logits_are_ever_whole(saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, largest = LogitDistances._compare, Largest()

    def watched(self: Any) -> None:
        with largest:
            plain(self)

    monkeypatch.setattr(LogitDistances, "_compare", watched)
    base = build("qwen2", False)
    saved([base, noisy(base, 1)]).distances(token_ids(), one, [0])
    assert 0 < largest.elements <= 60 * 32 < 60 * 97  # what the heads are given


def test_a_head_that_cannot_be_cut(saved: Any, one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "is_elementwise", lambda model, numbers: False)
    with pytest.raises(CheckpointError, match="does more than score each token by itself"):
        saved([build("qwen2")] * 2).distances(token_ids(), one, [0])


# ---- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [1, 3])
def test_each_model_on_its_own_text(saved: Any, one: Workers, texts: int) -> None:
    base = build("qwen2")
    live = [base, noisy(base, 1, tied=False), noisy(base, 2)]
    ids = [token_ids(seed=seed) for seed in range(texts)]
    trio = saved(live)
    steps = 0

    def advance(count: int) -> None:
        nonlocal steps
        steps += count

    settings = CalibrationSettings(text=["any"] * texts)
    found = measure_sensitivity(trio.models, ids, settings, trio.folder / "walk", one, advance, Phases())
    assert steps == sensitivity_steps(trio.models, texts) == 3 * 5 + texts * 6
    for i, model in enumerate(live):
        own = ids[i if texts > 1 else 0]
        assert found.blocks[i] == pytest.approx(autograd(model, own), rel=2e-5)
        for j, other in enumerate(live):
            text = ids[j if texts > 1 else 0]
            apart = whole_logits(model, text) - whole_logits(other, text)
            assert found.distances[i][j] == pytest.approx(apart.norm(dim=1).mean().item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_on_a_gpu(tmp_path: Path, kind: str, one: Workers) -> None:
    live, ids = [build(kind), noisy(build(kind), 1, tied=False)], token_ids()
    pair = Saved(tmp_path, live, device="cuda")
    settings = CalibrationSettings(text=["any"])
    found = measure_sensitivity(pair.models, [ids], settings, tmp_path / "w", one, lambda steps: None, Phases())
    for blocks, model in zip(found.blocks, live, strict=True):
        assert blocks == pytest.approx(autograd(model, ids), rel=1e-4)
    apart = whole_logits(live[0], ids) - whole_logits(live[1], ids)
    assert found.distances[0][1] == pytest.approx(apart.norm(dim=1).mean().item(), rel=1e-4)
    pair.close()


WORDS = ("the quick brown fox jumps over the lazy dog ", "pack my box with five dozen jugs ", "how vexingly ")


def write_texts(models: Models, folder: Path, count: int) -> list[Path]:
    """Give the base a tokenizer, and write texts."""
    give_tokenizer(models.base)
    paths = [folder / f"text{number}" for number in range(count)]
    for path, words in zip(paths, WORDS, strict=False):
        path.write_text(words * 20)
    return paths


@dataclass
class Bar:
    """A progress bar: the steps announced, and those that came."""

    total: int
    done: int = 0

    def update(self, steps: int) -> None:
        self.done += steps

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.mark.parametrize("texts", [1, 3])
def test_what_is_recorded(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int) -> None:
    paths = write_texts(models, tmp_path, texts)
    settings = CalibrationSettings(text=[str(path) for path in paths], samples=3, length=12)
    bars: list[Bar] = []

    def watched(total: int, *args: object) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(measure, "progress_bar", watched)
    opened = [Checkpoint.open(folder) for folder in models]
    ids = calibration_tokens(opened[0], 48, settings)
    run = FisherRun("cpu")
    record = calibrate(opened, settings, ("sensitivity",), tmp_path / "c", run).record
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["calibration.json"]
    assert bars == [Bar(3 * 5 + texts * 6, 3 * 5 + texts * 6)]
    assert record.sensitivity is not None and len(record.tokens) == texts
    live = [AutoModelForCausalLM.from_pretrained(folder) for folder in models]
    for i, model in enumerate(live):
        own = ids[i if texts > 1 else 0]
        assert record.sensitivity.blocks[i] == pytest.approx(autograd(model, own), rel=2e-5)
    assert calibrate(opened, settings, ("sensitivity",), tmp_path / "c", run).record == record  # not measured again
    assert len(bars) == 1
    if texts == 1:  # beside another measurement, the same numbers
        both = calibrate(opened, settings, ("sensitivity", "channels"), tmp_path / "d", run)
        assert both.record.sensitivity == record.sensitivity
        alone = calibrate(opened, settings, ("channels",), tmp_path / "e", run)
        assert alone.record.tensors == both.record.tensors
        assert all(torch.equal(alone.read(name), both.read(name)) for name in alone.record.tensors)
        assert bars[1:] == [Bar(3 * 5 + 6 + 2, 3 * 5 + 6 + 2), Bar(2, 2)]
    for checkpoint in opened:
        checkpoint.close()


@pytest.mark.parametrize("texts", [1, 2])
def test_the_bytes_that_plan_tells_are_read(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    settings = CalibrationSettings(
        text=[str(path) for path in write_texts(models, tmp_path, texts)], samples=2, length=12
    )
    opened = [Checkpoint.open(folder) for folder in models[:2]]
    count = 0
    plain = LocalFile.read_into

    def counted(self: LocalFile, buffer: memoryview, offset: int) -> None:
        nonlocal count
        count += len(buffer)
        plain(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", counted)
    calibrate(opened, settings, ("sensitivity",), tmp_path / "c", FisherRun("cpu"))
    cost = calibration_cost(opened, settings, ("sensitivity",))
    rows = 2 * (1 + texts) * 48 * 16 * 4  # of the tied embedding, by token, besides all of it as the head
    block = sum(value.nbytes for name, value in tensors(models.base).items() if ".layers.1." in name)
    assert cost.bytes_to_read - 2 * block <= count <= cost.bytes_to_read + rows  # the last block is read once
    for checkpoint in opened:
        checkpoint.close()


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [1, 3])
def test_a_merge_by_sens(models: Models, tmp_path: Path, run: Run, texts: int) -> None:
    """The coefficients that whole models in memory give, and the merge that they give."""
    paths = write_texts(models, tmp_path, texts)
    given = [word for path in paths for word in ("--calibration", path)]
    command = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "-m", "sens", "--device", "cpu")
    command = (*command, *given, "--calibration-samples", "4", "--calibration-length", "16", "--temperature", "0.1")
    result = run(*command, "--coefficient", "0.5", "--coefficient", "0.25", "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)["tensors"]

    settings = CalibrationSettings(text=[str(path) for path in paths], samples=4, length=16)
    with Checkpoint.open(models.base) as base:
        ids = calibration_tokens(base, 48, settings)
    live = [AutoModelForCausalLM.from_pretrained(folder) for folder in models]
    of = [ids[i if texts > 1 else 0] for i in range(3)]
    pairs = [[(whole_logits(a, text), whole_logits(b, text)) for b, text in zip(live, of, strict=True)] for a in live]
    distances = [[(one - other).norm(dim=1).mean().item() for one, other in row] for row in pairs]
    blocks = [autograd(model, text) for model, text in zip(live, of, strict=True)]
    sensitivities = torch.tensor([list(of_model.values()) for of_model in blocks])
    alpha = sensitivities / sensitivities.norm(dim=1, keepdim=True)
    tau = torch.tensor(distances).sum(1, keepdim=True) / torch.tensor(distances).sum()
    scales = 3 * torch.softmax(alpha * tau / 0.1, 0)  # [models, blocks]
    assert scales[1].max() / scales[1].min() > 1.01  # so that the blocks can be told apart
    coefficients = (torch.tensor([0.5, 0.25])[:, None] * scales[1:]).T.tolist()  # [blocks, fine-tuned models]
    states = [tensors(folder) for folder in models]
    merged = tensors(tmp_path / "out")
    for name, tensor in merged.items():
        mean = [sum(of_model) / 2 for of_model in zip(*coefficients, strict=True)]
        wanted = coefficients[int(name.split(".")[2])] if ".layers." in name else mean
        assert told[name]["coefficient"] == pytest.approx(wanted, rel=1e-5)
        base = states[0][name].double()
        by_hand = base + sum(c * (state[name].double() - base) for c, state in zip(wanted, states[1:], strict=True))
        torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-5, atol=1e-6)
    plan = run("plan", *command)
    assert "calibration    sensitivity on 64 tokens per text, " in plan.out and " for the calibration\n" in plan.out

    again = run(*command, "--coefficient", "0.5", "--coefficient", "0.25", "--out", tmp_path / "again")
    assert again.code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert run(*command, "--aim", "0.4", "--out", tmp_path / "aim").code == (0 if texts == 1 else 1)


@pytest.mark.parametrize("texts", [0, 2, 4])
def test_a_text_for_all_or_one_for_each(models: Models, tmp_path: Path, run: Run, texts: int) -> None:
    (path,) = write_texts(models, tmp_path, 1)
    command = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "-m", "sens", "--out", tmp_path / "out")
    result = run(*command, *["--calibration", path] * texts)
    assert result.code == 1 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()
    words = "give one for all, or 3: the base's first" if texts else "method sens needs a calibration text"
    assert words in result.err
