"""The walk over the head against cross entropy and autograd with all logits in memory, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import Collector, assert_close, build, saved, settings, textbook
from tiny_models import put, tensors
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError
from streammerge.fisher import fisher, head
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.head import HeadWalk, InputGradients
from streammerge.fisher.phases import Phases
from streammerge.workers import Workers

Logits = Callable[[Tensor], Tensor]
HEADS: dict[str, tuple[dict[str, Any], Logits]] = {
    "llama": ({}, lambda raw: raw),
    "phi": ({}, lambda raw: raw),  # has a bias
    "gemma2": ({}, lambda raw: 5 * torch.tanh(raw / 5)),
    "cohere": ({"logit_scale": 0.25}, lambda raw: raw * 0.25),
    "granite": ({"logits_scaling": 3.0}, lambda raw: raw / 3),
}
SEQUENCES, TOKENS = 3, 6


@contextmanager
def walk_over(folder: Path, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Iterator[HeadWalk]:
    with Checkpoint.open(folder) as base, Workers(1) as workers:
        model = BlockModel(base, dtype, torch.device("cpu"))
        assert model.head is not None
        model.load_embedding_rows(torch.arange(97))
        model.load_outside({model.embedding, model.head})
        yield HeadWalk(model, inputs, targets, Phases(), workers)


@pytest.fixture(params=[1, 7, 40, 97, 1000], ids=lambda rows: f"{rows} rows")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Vocabulary rows that are walked together."""
    monkeypatch.setattr(head, "head_rows", lambda row_bytes, tokens: request.param)
    monkeypatch.setattr(head, "SQUARES", 5 * SEQUENCES * 32)
    return int(request.param)


@pytest.fixture
def inputs() -> Tensor:
    return 2 * torch.randn(SEQUENCES, TOKENS, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, 97, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("kind", HEADS)
def test_scores_and_squares(tmp_path: Path, inputs: Tensor, targets: Tensor, kind: str) -> None:
    changes, logits = HEADS[kind]
    live = build(kind, False, **changes)
    live.save_pretrained(tmp_path / "model")
    layer: nn.Linear = live.lm_head.double()
    x = inputs.double().requires_grad_()
    raw = layer(x)
    losses = functional.cross_entropy(logits(raw).flatten(0, 1), targets.flatten(), reduction="none").view(3, -1).sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    names = {f"lm_head.{leaf}": parameter for leaf, parameter in layer.named_parameters()}
    squares = {
        name: sum(torch.autograd.grad(loss, p, retain_graph=True)[0] ** 2 for loss in losses) / 3
        for name, p in names.items()
    }

    with walk_over(tmp_path / "model", inputs, targets, torch.float32) as walk:
        assert walk.is_elementwise()
        scores = walk.scores()
        sink = Collector(walk.model.base)
        walk.squares(scores.normaliser, sink, set(names), None)
        for name in names:
            sink.done(name)
    assert scores.losses.dtype == torch.float64 and scores.gradient.dtype == torch.float32
    torch.testing.assert_close(scores.losses, losses, rtol=1e-6, atol=0, check_dtype=False)
    normaliser = logits(raw).logsumexp(-1)
    torch.testing.assert_close(scores.normaliser, normaliser, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_close({"x": scores.gradient}, {"x": gradient}, 1e-6)
    assert set(names) == ({"lm_head.weight", "lm_head.bias"} if kind == "phi" else {"lm_head.weight"})
    assert_close(sink.values, squares, 3e-6)


def test_in_float64_it_is_exact_to_float64(tmp_path: Path, inputs: Tensor, targets: Tensor) -> None:
    layer = build("llama", False).lm_head.double()
    folder = saved(tmp_path / "model", "llama", False)
    x = inputs.double().requires_grad_()
    loss = functional.cross_entropy(layer(x).flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    with walk_over(folder, inputs.double(), targets, torch.float64) as walk:
        scores = walk.scores()
    assert scores.losses.sum().item() == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(scores.gradient, x.grad, rtol=1e-12, atol=1e-13)


def test_only_what_is_wanted_is_squared(tmp_path: Path, inputs: Tensor, targets: Tensor) -> None:
    with walk_over(saved(tmp_path / "model", "phi", False), inputs, targets, torch.float32) as walk:
        sink = Collector(walk.model.base)
        walk.squares(walk.scores().normaliser, sink, {"lm_head.bias"}, None)
        sink.done("lm_head.bias")
        sink.sync()
    assert set(sink.values) == {"lm_head.bias"}


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("right", [0, 48, 96])
@pytest.mark.parametrize("rising", [True, False])
def test_huge_logits_do_not_overflow(tmp_path: Path, right: int, rising: bool) -> None:
    """From -1e4 to 1e4, the largest in the last block of rows or in the first; exact numbers, so that all are."""
    folder = saved(tmp_path / "model", "llama", False)
    weight = torch.randint(-3, 4, (97, 32), generator=torch.Generator().manual_seed(0)).float()
    column = torch.cat([torch.linspace(-1e4, 9000, 94).round(), torch.tensor([9998.0, 9999.0, 1e4])])
    weight[:, 0] = column if rising else column.flip(0)
    put(folder, "lm_head.weight", weight)
    x = torch.zeros(1, 2, 32)
    x[0, :, 0] = torch.tensor([1.0, -1.0])
    targets = torch.full((1, 2), right)

    wide = x.double().requires_grad_()
    loss = functional.cross_entropy((wide @ weight.double().T)[0], targets[0], reduction="sum")
    loss.backward()
    with walk_over(folder, x, targets, torch.float32) as walk:
        scores = walk.scores()
        sink = Collector(walk.model.base)
        walk.squares(scores.normaliser, sink, {"lm_head.weight"}, None)
        sink.done("lm_head.weight")
    assert scores.losses.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-3)
    assert wide.grad is not None
    assert_close({"x": scores.gradient}, {"x": wide.grad}, 1e-5)
    assert sink.values["lm_head.weight"].isfinite().all()


@pytest.mark.usefixtures("rows")
def test_a_tied_head_squares_the_sum_of_both_gradients(tmp_path: Path, inputs: Tensor, targets: Tensor) -> None:
    weight = build("llama", True).lm_head.weight.detach().double().requires_grad_()
    folder = saved(tmp_path / "model", "llama", True)
    tokens = torch.tensor([0, 6, 7, 50, 96])
    at_input = torch.randn(SEQUENCES, len(tokens), 32, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros_like(weight)
    for x, target, added in zip(inputs.double(), targets, at_input, strict=True):
        (gradient,) = torch.autograd.grad(functional.cross_entropy(x @ weight.T, target, reduction="sum"), weight)
        expected = expected + gradient.index_add(0, tokens, added.double()).square() / SEQUENCES
    name = "model.embed_tokens.weight"
    with walk_over(folder, inputs, targets, torch.float32) as walk:
        sink = Collector(walk.model.base)
        walk.squares(walk.scores().normaliser, sink, {name}, InputGradients(tokens, at_input))
        sink.done(name)
    assert_close(sink.values, {name: expected.detach()}, 3e-6)


# ---- Heads that cannot be cut ---------------------------------------------------------------------------------------


def normalised(model: Any, logits: Tensor) -> Tensor:
    return logits / (1 + logits.square().mean(-1, keepdim=True)).sqrt()


def weighted(model: Any, logits: Tensor) -> Tensor:
    return logits * torch.linspace(0.5, 2, 97)


def one_token_apart(model: Any, logits: Tensor) -> Tensor:
    return logits.index_add(-1, torch.tensor([3]), torch.full((*logits.shape[:-1], 1), 5.0))


@pytest.mark.parametrize("change", [normalised, weighted, one_token_apart])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_mixes_its_logits_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Tensor], Tensor], tied: bool
) -> None:
    folder = saved(tmp_path / "model", "llama", tied)
    plain = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = change(self, output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    expected, loss = textbook(build("llama", tied))
    record = fisher(str(folder), tmp_path / "matrices", settings(), device="cpu")
    assert_close(tensors(tmp_path / "matrices"), expected)
    assert record.loss == pytest.approx(loss, rel=1e-6)
    assert [note for note in record.notes if "all of it is in memory" in note] == record.notes != []
    if tied:
        with pytest.raises(CheckpointError, match=r"its head is tied .* leave out --all-parameters"):
            fisher(str(folder), tmp_path / "all", settings(all_parameters=True), device="cpu")
    else:
        fisher(str(folder), tmp_path / "all", settings(all_parameters=True), device="cpu")
        assert set(tensors(tmp_path / "all")) == set(expected)
        assert_close(tensors(tmp_path / "all"), expected)


class LinearHead(nn.Linear):
    """Uses its weight in a linear function; a scale of its own."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale = nn.Parameter(torch.ones(97))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class MatrixHead(LinearHead):
    """Uses its weight in another way."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...h,vh->...v", input, self.weight) * self.scale


@pytest.mark.parametrize("head_class", [LinearHead, MatrixHead])
def test_a_head_of_another_class_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_class: type[nn.Linear]
) -> None:
    plain = LlamaForCausalLM.__init__

    def init(self: Any, config: Any) -> None:
        plain(self, config)
        self.lm_head = head_class(config.hidden_size, config.vocab_size, bias=False)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    model = build("llama", False)
    model.save_pretrained(tmp_path / "model")
    expected, _ = textbook(model)
    for everything in (True, False):
        out = tmp_path / f"out-{everything}"
        record = fisher(str(tmp_path / "model"), out, settings(all_parameters=everything), device="cpu")
        assert ("lm_head.scale" in tensors(out)) is everything
        assert_close(tensors(out), expected)
        assert len(record.notes) == 1
