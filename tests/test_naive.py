"""Golden checks of the naive reference, computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from naive import (
    block_alphas,
    disjoint_mean,
    naive_fim,
    naive_fisher,
    naive_linear,
    naive_task_arithmetic,
    naive_ties,
    top_k_mask,
)
from torch import Tensor, nn

MOST, LEAST = 0.5, 1 - 1 / (1 + math.e)  # the two ends that adaptive theta always attains: 0.5 and 0.7310586


class Unigram(nn.Module):
    """Logits = one bias vector at every position: the gradient of the summed loss is n softmax(b) - counts."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1))


def test_fisher_of_a_unigram_model() -> None:
    fisher, loss = naive_fisher(Unigram(3), samples=4, length=7, seed=1)
    ids = torch.randint(0, 3, (4, 7), generator=torch.Generator().manual_seed(1))
    gradients = [[6 / 3 - row[1:].tolist().count(v) for v in range(3)] for row in ids]  # per sequence
    expected = [sum(g[v] ** 2 for g in gradients) / 4 for v in range(3)]
    torch.testing.assert_close(fisher["bias"], torch.tensor(expected))
    assert loss == pytest.approx(6 * math.log(3))


def test_top_k_keeps_exactly_k_and_the_first_of_ties() -> None:
    assert top_k_mask(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), 3).tolist() == [[True, True], [True, False]]
    assert not top_k_mask(torch.ones(3), 0).any()


def test_alphas() -> None:
    assert block_alphas([0.0, 4.0, 2.0], "adaptive") == pytest.approx([LEAST, MOST, 0.6224593])
    assert block_alphas([0.0, 4.0, -math.inf], "adaptive") == pytest.approx([LEAST, MOST, LEAST])
    assert block_alphas([0.0, 4.0], 0.1) == pytest.approx([1 - 1 / (1 + math.exp(0.4)), MOST])
    assert block_alphas([3.0, 3.0], "adaptive") == [0.5, 0.5]
    assert block_alphas([-math.inf, -math.inf], "adaptive") == [0.5, 0.5]


def test_disjoint_mean() -> None:
    a, b, c = (
        torch.tensor([1.0, 1.0, 0.0, 0.0]),
        torch.tensor([3.0, -1.0, -2.0, 0.0]),
        torch.tensor([-1.0, 0.0, 0.0, 0.0]),
    )
    assert disjoint_mean([a, b, c]).tolist() == [2.0, 1.0, -2.0, 0.0]  # a zero sum counts as +


def two_blocks() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Base, expert and Fisher: block 0 has the score log(8), block 1 log(2)."""
    q, gate, bias = "self_attn.q_proj.weight", "mlp.gate_proj.weight", "self_attn.q_proj.bias"
    delta = {
        "model.embed_tokens.weight": torch.ones(2, 2),
        f"model.layers.0.{q}": torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
        f"model.layers.0.{gate}": torch.tensor([[1.0, -1.0, 1.0, 1.0]]),
        f"model.layers.0.{bias}": torch.tensor([100.0, 200.0]),
        f"model.layers.1.{q}": torch.tensor([[2.0, 0.0]]),
        "model.norm.weight": torch.ones(2),
    }
    fisher = {name: torch.full_like(d, 1e9) for name, d in delta.items()}
    fisher[f"model.layers.0.{q}"] = torch.tensor([[1.0, 9.0], [2.0, 4.0]])
    fisher[f"model.layers.0.{gate}"] = torch.tensor([[12.0, 12.0, 12.0, 12.0]])  # pooled mean: 64 / 8 = 8
    fisher[f"model.layers.1.{q}"] = torch.tensor([[1.0, 1.0]])  # mean square 2, score log 2
    base = {name: torch.ones_like(d) for name, d in delta.items()}
    return base, {name: b + delta[name] for name, b in base.items()}, fisher


def test_fim_on_two_blocks() -> None:
    base, expert, fisher = two_blocks()
    r = naive_fim(base, [expert], fisher, density=0.5, norm_tolerance=None)
    assert r.fisher_mean == [8.0, 1.0]
    assert r.task_vector_mean_square == [[1.0, 2.0]]
    assert r.scores[0] == pytest.approx([math.log(8), math.log(2)])
    assert r.alphas[0] == pytest.approx([MOST, LEAST])
    expected = {
        "model.embed_tokens.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.q_proj.weight": torch.tensor([[1.0, 0.5], [1.0, 1.5]]),
        "model.layers.0.mlp.gate_proj.weight": torch.tensor([[1.35, 0.65, 1.0, 1.0]]),  # 0.7 alpha; first of the ties
        "model.layers.0.self_attn.q_proj.bias": torch.tensor([51.0, 101.0]),  # untrimmed
        "model.layers.1.self_attn.q_proj.weight": torch.tensor([[1 + 2 * LEAST, 1.0]]),
        "model.norm.weight": torch.ones(2),
    }
    assert list(r.merged) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(r.merged[name], tensor)
    assert r.kept == {name: expected[name].numel() // 2 for name in r.kept} and len(r.kept) == 3
    assert r.threshold["model.layers.0.self_attn.q_proj.weight"] == [4.0]
    assert r.norm_ratio == r.rescaled == {}


def test_fim_importance_and_trim_options() -> None:
    base, expert, fisher = two_blocks()
    assert naive_fim(base, [expert], fisher, importance="fim").alphas[0] == pytest.approx([MOST, LEAST])
    assert naive_fim(base, [expert], fisher, importance="norm").alphas[0] == pytest.approx([LEAST, MOST])
    whole = naive_fim(base, [expert], fisher, trim=False, gate_factor=1.0, norm_tolerance=None)
    assert whole.merged["model.layers.0.mlp.gate_proj.weight"].tolist() == [[1.5, 0.5, 1.5, 1.5]]
    assert whole.kept == {}
    tie = naive_fim(base, [base], fisher)
    assert tie.alphas == [[0.5, 0.5]] and all(torch.equal(tie.merged[n], t) for n, t in base.items())


def test_fim_of_two_experts() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base, fisher = {name: torch.zeros(1, 4)}, {name: torch.ones(1, 4)}
    experts = [{name: torch.tensor([[4.0, -2.0, 1.0, 0.0]])}, {name: torch.tensor([[2.0, 2.0, -3.0, 0.0]])}]
    elected = naive_fim(base, experts, fisher, density=1.0)
    assert elected.merged[name].tolist() == [[1.5, 1.0, -1.5, 0.0]]  # alpha 0.5; -1 + 1 = 0 counts as +
    assert elected.norm_ratio[name] == math.inf and not elected.rescaled[name]  # a zero base has no norm to match
    summed = naive_fim(base, experts, fisher, trim=False, elect=False)
    assert summed.merged[name].tolist() == [[3.0, 0.0, -1.0, 0.0]]
    trimmed = naive_fim(base, experts, fisher, density=0.25)
    assert trimmed.merged[name].tolist() == [[2.0, 0.0, -1.5, 0.0]]
    assert trimmed.kept == {name: 1} and trimmed.threshold == {name: [4.0, 3.0]}


@pytest.mark.parametrize(("growth", "rescaled"), [(0.08, False), (0.12, True), (-0.12, True)])
def test_norm_calibration_of_a_scaled_matrix(growth: float, rescaled: bool) -> None:
    """One block: alpha 0.5, so W = (1 + growth / 2) W0 and the ratio is that factor, whatever the probes."""
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])}
    r = naive_fim(base, [{name: base[name] * (1 + growth)}], {name: torch.ones(3, 2)}, density=1.0)
    assert r.norm_ratio[name] == pytest.approx(1 + growth / 2, rel=1e-6)
    assert r.rescaled[name] is rescaled
    torch.testing.assert_close(r.merged[name], base[name] * (1 if rescaled else 1 + growth / 2))


def test_norm_calibration_uses_the_seeded_probes() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    r = naive_fim({name: torch.eye(2)}, [{name: torch.diag(torch.tensor([1.0, 3.0]))}], {name: torch.ones(2, 2)})
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(42)).double().square().sum(1).tolist()
    ratio = math.sqrt((x + 4 * y) / (x + y))  # W = diag(1, 2)
    assert r.norm_ratio[name] == pytest.approx(ratio)
    torch.testing.assert_close(r.merged[name], torch.diag(torch.tensor([1.0, 2.0])) / ratio)


VECTORS = [{"w": torch.tensor(v)} for v in ([3.0, -1.0], [-1.0, -1.0], [-1.0, 4.0])]


def test_task_arithmetic_and_linear() -> None:
    base = {"w": torch.tensor([1.0, 1.0])}  # deltas (2, -2), (-2, -2), (-2, 3)
    assert naive_task_arithmetic(base, VECTORS, [0.5, 1.0, 2.0])["w"].tolist() == [-4.0, 4.0]
    assert naive_linear(VECTORS, [1.0, 1.0, 2.0])["w"].tolist() == [0.0, 1.5]


def test_ties() -> None:
    base = {"w": torch.zeros(2)}
    torch.testing.assert_close(naive_ties(base, VECTORS, [0.2, 1.0, 1.0], 1.0)["w"], torch.tensor([-1.0, 4.0]))
    summed = naive_ties(base, VECTORS, [0.2, 1.0, 1.0], 1.0, scale=0.5, normalize=False)["w"]
    torch.testing.assert_close(summed, torch.tensor([-1.0, 2.0]))
    # density 0.5 keeps (3, 0), (-1, 0), (0, 4): sum of y = (-0.4, 4), so -1 alone and 4 alone
    torch.testing.assert_close(naive_ties(base, VECTORS, [0.2, 1.0, 1.0], 0.5)["w"], torch.tensor([-1.0, 4.0]))
    one = naive_ties(base, [{"w": torch.tensor([2.0, 2.0])}], [0.5], 0.5, scale=3.0)["w"]
    assert one.tolist() == [6.0, 0.0]
    # zero sum counts as +
    assert naive_ties(base, [{"w": -torch.ones(2)}, {"w": torch.ones(2)}], [1.0, 1.0], 1.0)["w"].tolist() == [1.0, 1.0]
