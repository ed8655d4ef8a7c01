"""FIM-TIES and FIM-TA: by hand, against the naive reference, and every option against its formula."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from methods.driver import Merged, Models, make_models, matrices_of, merge, resolve
from naive import FimResult, block_alphas, block_of, disjoint_mean, keep_count, naive_fim, top_k_mask
from torch import Tensor

from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods import api

MOST, LEAST = 0.5, 1 / (1 + math.exp(-1))
Q, GATE, BIAS = "self_attn.q_proj.weight", "mlp.gate_proj.weight", "self_attn.q_proj.bias"
PLAIN: dict[str, Any] = {"gate_factor": 1.0, "norm_tolerance": "off"}  # nothing but coefficients and trim
TA = {"trim": False, "elect": False, "gate_factor": 1.0, "norm_tolerance": None}  # what FIM-TA is to `naive_fim`


def close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def one_matrix(*task_vectors: list[float], base: float = 0.0, fisher: list[float] | None = None) -> Models:
    """One block with one matrix of one row; its coefficient is 0.5."""
    name = f"model.layers.0.{Q}"
    rows = [torch.tensor([vector]) for vector in task_vectors]
    origin = torch.full_like(rows[0], base)
    weights = torch.ones_like(origin) if fisher is None else torch.tensor([fisher])
    return Models({name: origin}, [{name: origin + row} for row in rows], {name: weights})


def two_blocks() -> Models:
    """Base 1 everywhere. Block 0: mean F = 64 / 8 = 8, mean d^2 = 1, score log 8; block 1: 1, 2, log 2."""
    deltas = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.0, -1.0], [1.0, 1.0]],
        f"model.layers.0.{GATE}": [[1.0, -1.0, 1.0, 1.0]],
        f"model.layers.0.{BIAS}": [100.0, 200.0],
        f"model.layers.1.{Q}": [[2.0, 0.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    base = {name: torch.ones_like(torch.tensor(delta)) for name, delta in deltas.items()}
    fisher = {name: torch.full_like(tensor, 1e9) for name, tensor in base.items()}
    fisher[f"model.layers.0.{Q}"] = torch.tensor([[1.0, 9.0], [2.0, 4.0]])
    fisher[f"model.layers.0.{GATE}"] = torch.full((1, 4), 12.0)
    fisher[f"model.layers.1.{Q}"] = torch.ones(1, 2)
    return Models(base, [{name: base[name] + torch.tensor(delta) for name, delta in deltas.items()}], fisher)


# ---- By hand ----------------------------------------------------------------------------------------------------


def test_by_hand_on_two_blocks() -> None:
    """Scores log 8 and log 2: the most and the least important, so 1 - sigmoid(0) and 1 - sigmoid(-1) = 0.7310586."""
    merged = merge("fim_ties", two_blocks(), density=0.5, norm_tolerance="off")
    expected = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.0, 0.5], [1.0, 1.5]],  # w = (1, 9, 2, 4): the two largest, times 0.5
        f"model.layers.0.{GATE}": [[1.35, 0.65, 1.0, 1.0]],  # times 0.7 * 0.5; the first of four ties
        f"model.layers.0.{BIAS}": [51.0, 101.0],  # untrimmed, and not in the score
        f"model.layers.1.{Q}": [[1 + 2 * LEAST, 1.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    close(merged.tensors, {name: torch.tensor(values) for name, values in expected.items()})
    assert merged.blocks == [
        {"block": 0, "fisher_mean": 8.0, "task_vector_mean_square": 1.0, "score": math.log(8), "alpha": MOST},
        {"block": 1, "fisher_mean": 1.0, "task_vector_mean_square": 2.0, "score": math.log(2), "alpha": LEAST},
    ]
    assert merged.reports == {
        f"model.layers.0.{Q}": {"coefficient": [0.5], "kept": [2]},
        f"model.layers.0.{GATE}": {"coefficient": [0.35], "kept": [2]},
        f"model.layers.0.{BIAS}": {"coefficient": [0.5]},
        f"model.layers.1.{Q}": {"coefficient": [LEAST], "kept": [1]},
    }


def test_by_hand_whole_task_vectors_on_two_blocks() -> None:
    """The coefficients of `fim_ties` on all of (1, -1, 1, 1), the gate's (1, -1, 1, 1), (100, 200) and (2, 0)."""
    merged = merge("fim_ta", two_blocks())
    expected = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.5, 0.5], [1.5, 1.5]],
        f"model.layers.0.{GATE}": [[1.5, 0.5, 1.5, 1.5]],
        f"model.layers.0.{BIAS}": [51.0, 101.0],
        f"model.layers.1.{Q}": [[2.4621172, 1.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    close(merged.tensors, {name: torch.tensor(values) for name, values in expected.items()})
    assert merged.alphas == [MOST, LEAST]


@pytest.mark.parametrize(
    ("method", "density", "expected"),
    [
        # scaled by 0.5: (2, -1, 0.5, 0) and (1, 1, -1.5, 0); elected (+, +, -, +), averaged by their count
        ("fim_ties", 1.0, [1.5, 1.0, -1.5, 0.0]),
        # each keeps its largest: (2, 0, 0, 0) and (0, 0, -1.5, 0)
        ("fim_ties", 0.25, [2.0, 0.0, -1.5, 0.0]),
        ("fim_ta", 1.0, [3.0, 0.0, -1.0, 0.0]),  # summed
    ],
)
def test_two_experts(method: str, density: float, expected: list[float]) -> None:
    models = one_matrix([4.0, -2.0, 1.0, 0.0], [2.0, 2.0, -3.0, 0.0])
    merged = merge(method, models, density=density)
    assert merged.tensors[f"model.layers.0.{Q}"].tolist() == [expected]
    assert [(row["expert"], row["alpha"]) for row in merged.blocks] == [("ft0", 0.5), ("ft1", 0.5)]


def test_parameters_of_each_expert() -> None:
    """0.5 * 2 * (4, 0) and 0.5 * 1 * (2, 2): elected (+, +)."""
    models = one_matrix([4.0, -2.0], [2.0, 2.0])
    merged = merge("fim_ties", models, density=[0.5, 1.0], coefficient=[2.0, 1.0])
    assert merged.tensors[f"model.layers.0.{Q}"].tolist() == [[2.5, 1.0]]
    assert merged.reports[f"model.layers.0.{Q}"] == {
        "coefficient": [1.0, 0.5],
        "kept": [1, 2],
        "norm_ratio": None,  # a base of zeros has no norm to match
        "rescaled": False,
    }


# ---- Against the naive reference --------------------------------------------------------------------------------


def assert_like_naive(merged: Merged, truth: FimResult, trims: bool) -> None:
    close(merged.tensors, truth.merged)
    rows = iter(merged.blocks)
    for squares, scores, alphas in zip(truth.task_vector_mean_square, truth.scores, truth.alphas, strict=True):
        for block, mean, square, score, alpha in zip(
            truth.blocks, truth.fisher_mean, squares, scores, alphas, strict=True
        ):
            row = next(rows)
            assert row["block"] == block
            assert row["fisher_mean"] is None or row["fisher_mean"] == pytest.approx(mean, rel=1e-12)
            assert row["task_vector_mean_square"] == pytest.approx(square, rel=1e-12)
            assert row["score"] == (pytest.approx(score, rel=1e-12) if score > -math.inf else None)
            assert row["alpha"] == pytest.approx(alpha, rel=1e-12)
    assert next(rows, None) is None
    for name, entry in merged.reports.items():
        assert ("kept" in entry) is (trims and name in truth.kept)
        if "kept" in entry:
            assert entry["kept"] == [truth.kept[name]] * len(truth.alphas)
        assert ("norm_ratio" in entry) is (name in truth.norm_ratio)
        if "norm_ratio" in entry:
            assert entry["norm_ratio"] == pytest.approx(truth.norm_ratio[name], rel=1e-6)
            assert entry["rescaled"] is truth.rescaled[name]


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.37},
        {"density": 0.0},
        {"density": 1.0},
        {"importance": "fim"},
        {"importance": "norm"},
        {"theta": 0.3},
        {"theta": 0.0},
        {"gate_factor": 0.0},
        {"gate_factor": 1.3},
        {"norm_tolerance": 0.0},
        {"norm_tolerance": 0.01, "density": 1.0},
        {"norm_tolerance": None},
    ],
    ids=str,
)
def test_fim_ties_equals_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts)
    ours = {key: "off" if value is None else value for key, value in options.items()}
    truth = naive_fim(models.base, models.experts, models.fisher, **options)
    assert_like_naive(merge("fim_ties", models, **ours), truth, trims=True)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"theta": 0.2}, {"importance": "fim"}, {"importance": "norm"}], ids=str)
def test_fim_ta_equals_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts, dtype=torch.float32)
    truth = naive_fim(models.base, models.experts, models.fisher, **TA, **options)
    assert_like_naive(merge("fim_ta", models, **options), truth, trims=False)


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_a_common_factor_of_the_fisher_changes_nothing(method: str) -> None:
    models = make_models(2)
    scaled = Models(models.base, models.experts, {name: 64 * f for name, f in models.fisher.items()})
    a, b = merge(method, models), merge(method, scaled)
    assert len(set(a.alphas)) > 3 and a.alphas == pytest.approx(b.alphas, rel=1e-12)
    close(b.tensors, a.tensors)


# ---- Every option against its formula ---------------------------------------------------------------------------


def expected_by(
    models: Models, coefficient: Callable[[str], float], masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """theta_0 + coefficient * mask * d for one expert, everything outside the blocks the base's."""
    merged = {}
    for name, origin in models.base.items():
        base = origin.float()
        delta = models.experts[0][name].float() - base
        kept = torch.where(masks[name], delta, 0.0) if masks and name in masks else delta
        merged[name] = base if block_of(name) is None else base + coefficient(name) * kept
    return merged


def weights(models: Models, trim: str) -> dict[str, Tensor]:
    """What the matrices' entries are trimmed by."""
    found = {}
    for name in matrices_of(models):
        delta = models.experts[0][name].float() - models.base[name].float()
        fisher = models.fisher[name].float()
        found[name] = {"fisher": fisher * delta.abs(), "quadratic": fisher * delta * delta, "magnitude": delta.abs()}[
            trim
        ]
    return found


def pooled(models: Models, names: Sequence[str], of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of of(F, d) over all elements of the named tensors together."""
    parts = []
    for name in names:
        delta = models.experts[0][name].float() - models.base[name].float()
        parts.append(of(models.fisher[name].double(), delta.double()).flatten())
    return torch.cat(parts).mean().item()


def block_coefficients(models: Models) -> Callable[[str], float]:
    """The default coefficients by tensor name."""
    truth = naive_fim(models.base, models.experts, models.fisher)
    return lambda name: truth.alpha(0, name)


@pytest.mark.parametrize("trim", ["fisher", "quadratic", "magnitude", "none"])
@pytest.mark.parametrize("scope", ["tensor", "block"])
def test_trim_and_its_scope(trim: str, scope: str) -> None:
    models = make_models(1)
    merged = merge("fim_ties", models, density=0.3, trim=trim, trim_scope=scope, **PLAIN)
    masks: dict[str, Tensor] = {}
    if trim != "none":
        by = weights(models, trim)
        groups = [[name] for name in by]
        if scope == "block":
            groups = [[name for name in by if block_of(name) == block] for block in range(3)]
        for group in groups:
            flat = torch.cat([by[name].flatten() for name in group])
            parts = top_k_mask(flat, keep_count(0.3, len(flat))).split([by[name].numel() for name in group])
            masks |= {name: part.view(by[name].shape) for name, part in zip(group, parts, strict=True)}
    close(merged.tensors, expected_by(models, block_coefficients(models), masks))
    for name, entry in merged.reports.items():
        assert ("kept" in entry) is (name in masks and scope == "tensor")


def test_the_three_trims_differ() -> None:
    """F |d| = (4, 3, 2), F d^2 = (4, 9, 8), |d| = (1, 3, 4): each keeps another entry."""
    models = one_matrix([1.0, 3.0, 4.0], fisher=[4.0, 1.0, 0.5])
    kept = {}
    for trim in ("fisher", "quadratic", "magnitude"):
        merged = merge("fim_ties", models, trim=trim, density=1 / 3, **PLAIN)
        kept[trim] = merged.tensors[f"model.layers.0.{Q}"].tolist()
    assert kept == {"fisher": [[0.5, 0.0, 0.0]], "quadratic": [[0.0, 1.5, 0.0]], "magnitude": [[0.0, 0.0, 2.0]]}


def test_a_block_as_the_scope_of_the_trim() -> None:
    """F |d| = (9, 4), (12, 12, 12, 12) and twice 1: half of block 0 are all four of the second matrix."""
    models = two_blocks()
    merged = merge("fim_ties", models, density=0.5, trim_scope="block", **PLAIN)
    assert merged.tensors[f"model.layers.0.{Q}"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert merged.tensors[f"model.layers.0.{GATE}"].tolist() == [[1.5, 0.5, 1.5, 1.5]]
    assert merged.tensors[f"model.layers.0.{BIAS}"].tolist() == [51.0, 101.0]


@pytest.mark.parametrize("importance", ["product", "fim", "norm", "quadratic"])
@pytest.mark.parametrize("granularity", ["block", "tensor"])
@pytest.mark.parametrize("theta", ["adaptive", 0.3])
def test_importance_granularity_and_theta(importance: str, granularity: str, theta: float | str) -> None:
    models = make_models(1)
    matrices = matrices_of(models)
    groups = {block: [n for n in matrices if block_of(n) == block] for block in range(3)}
    scored = list(groups.values()) if granularity == "block" else [[name] for name in sorted(matrices)]
    mean: dict[str, Callable[[Sequence[str]], float]] = {
        "product": lambda n: pooled(models, n, lambda f, d: f) * pooled(models, n, lambda f, d: d * d),
        "fim": lambda n: pooled(models, n, lambda f, d: f),
        "norm": lambda n: pooled(models, n, lambda f, d: d * d),
        "quadratic": lambda n: pooled(models, n, lambda f, d: f * d * d),
    }
    alphas = block_alphas([math.log(mean[importance](names)) for names in scored], theta)
    own = {name: alpha for names, alpha in zip(scored, alphas, strict=True) for name in names}

    def coefficient(name: str) -> float:
        names = groups[block_of(name)]
        return own.get(name, sum(own[n] for n in names) / len(names))  # biases and norms: the mean of their block

    merged = merge("fim_ta", models, importance=importance, granularity=granularity, theta=theta)
    close(merged.tensors, expected_by(models, coefficient))
    assert merged.alphas == pytest.approx(alphas, rel=1e-9)
    assert [row.get("tensor") for row in merged.blocks] == (
        [None] * 3 if granularity == "block" else [names[0] for names in scored]
    )
    assert len(set(alphas)) == len(alphas)


@pytest.mark.parametrize("importance", ["product", "fim", "norm", "quadratic"])
@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_every_expert_has_the_coefficients_it_has_alone(importance: str, granularity: str) -> None:
    models = make_models(2)
    options = {"importance": importance, "granularity": granularity}
    alone = [
        merge("fim_ta", Models(models.base, [expert], models.fisher), **options).alphas for expert in models.experts
    ]
    assert (alone[0] == alone[1]) is (importance == "fim")  # the Fisher is the base's
    assert merge("fim_ta", models, **options).alphas == [*alone[0], *alone[1]]


@pytest.mark.parametrize("importance", ["product", "fim", "norm", "quadratic"])
@pytest.mark.parametrize("trim", ["fisher", "quadratic", "magnitude", "none"])
def test_the_fisher_is_read_only_where_it_is_needed(importance: str, trim: str) -> None:
    models = make_models(1)
    method = resolve("fim_ties", importance=importance, trim=trim).method
    assert method.needs_fisher is (importance != "norm" or trim in ("fisher", "quadratic"))
    if not method.needs_fisher:
        merged = merge("fim_ties", Models(models.base, models.experts, {}), importance=importance, trim=trim)
        assert [row["fisher_mean"] for row in merged.blocks] == [None] * 3
        assert len(set(merged.alphas)) == 3


@pytest.mark.parametrize(
    ("tolerance", "growth", "rescaled"),
    [
        (0.05, 0.12, True),
        (0.05, 0.08, False),
        (0.05, -0.12, True),
        (0.05, -0.08, False),
        (0.01, 0.08, True),
        (0.0, 0.002, True),
        ("off", 0.12, None),
    ],
)
@pytest.mark.parametrize("scope", ["tensor", "block"])
def test_norm_tolerance(tolerance: float | str, growth: float, rescaled: bool | None, scope: str) -> None:
    shapes = {f"model.layers.0.{Q}": (3, 5), "model.layers.0.mlp.up_proj.weight": (4, 2)}
    base = {name: torch.arange(1.0, 1 + a * b).view(a, b) for name, (a, b) in shapes.items()}
    models = Models(
        base, [{n: b * (1 + growth) for n, b in base.items()}], {n: torch.ones_like(b) for n, b in base.items()}
    )
    merged = merge("fim_ties", models, density=1.0, norm_tolerance=tolerance, trim_scope=scope)
    factor = 1.0 if rescaled else 1 + growth / 2
    close(merged.tensors, {name: tensor * factor for name, tensor in base.items()})
    for entry in merged.reports.values():
        assert entry.get("rescaled") is rescaled
        assert ("norm_ratio" in entry) is (rescaled is not None)
        if rescaled is not None:
            assert entry["norm_ratio"] == pytest.approx(1 + growth / 2, rel=1e-6)


def test_norms_are_those_of_eight_seeded_probes() -> None:
    name = f"model.layers.0.{Q}"
    base, expert = torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))
    merged = merge("fim_ties", Models({name: base}, [{name: expert}], {name: torch.ones(2, 2)}), density=1.0)
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(42)).double().square().sum(1).tolist()
    ratio = math.sqrt((x + 4 * y) / (x + y))  # the merged matrix is diag(1, 2)
    assert merged.reports[name]["norm_ratio"] == pytest.approx(ratio, rel=1e-12)
    torch.testing.assert_close(merged.tensors[name], torch.diag(torch.tensor([1.0, 2.0])) / ratio)


ALL, NONE = slice(None), slice(0)
FUSED = {"mlp.gate_up_proj.weight": (8, 3), "mlp.experts.gate_up_proj": (2, 6, 4)}
DOWN = {"mlp.down_proj.weight": (3, 4), "mlp.experts.down_proj": (2, 4, 3)}
FUSED_SHAPES = {f"model.layers.{block}.{name}": shape for block in (0, 2) for name, shape in (FUSED | DOWN).items()}


@pytest.mark.parametrize(
    ("name", "shape", "down", "gate"),
    [
        ("mlp.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.gate_proj.bias", (4,), None, ALL),
        ("mlp.experts.3.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.experts.gate_proj", (2, 4, 3), None, ALL),
        ("mlp.shared_expert.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.shared_experts.gate_proj.weight", (4, 3), None, ALL),
        ("block_sparse_moe.experts.11.w1.weight", (4, 3), None, ALL),
        ("block_sparse_moe.experts.11.w2.weight", (3, 4), None, NONE),
        ("block_sparse_moe.experts.11.w3.weight", (4, 3), None, NONE),
        ("feed_forward.w1.weight", (4, 3), None, NONE),  # another model's w1
        ("experts_of_old.0.w1.weight", (4, 3), None, NONE),
        ("other_experts.0.w1.weight", (4, 3), None, NONE),
        ("mlp.gate.weight", (4, 3), None, NONE),  # routers
        ("block_sparse_moe.gate.weight", (4, 3), None, NONE),
        ("mlp.shared_expert_gate.weight", (1, 3), None, NONE),
        ("mlp.router.weight", (4, 3), None, NONE),
        ("mlp.up_proj.weight", (4, 3), None, NONE),
        ("mlp.investigate_project.weight", (4, 3), None, NONE),
        ("mlp.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.gate_up_proj.weight", (2, 3), (3, 1), slice(1)),
        ("mlp.gate_up_proj.weight", (8, 4), (4, 4), slice(4)),
        ("mlp.gate_up_proj.weight", (8, 3), None, NONE),
        ("mlp.gate_up_proj.weight", (7, 3), (3, 4), NONE),
        ("mlp.gate_up_proj.bias", (8,), (3,), NONE),
        ("mlp.shared_expert.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.experts.0.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 3), (2, 3, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 8), (2, 8, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 8), (2, 4, 8), NONE),  # the same shape, transposed
        ("mlp.experts.gate_up_proj", (2, 3, 8), (2, 4, 3), NONE),  # transposed
        ("mlp.experts.gate_up_proj", (2, 4, 8), (2, 4, 4), NONE),  # transposed, W_d square
        ("mlp.experts.gate_up_proj", (2, 8, 3), None, NONE),
        ("mlp.experts.gate_up_proj", (2, 8, 3), (1, 3, 4), NONE),
        ("mlp.experts.gate_up_proj_bias", (2, 8), None, NONE),
    ],
)
def test_what_is_a_gate_projection(
    name: str, shape: tuple[int, ...], down: tuple[int, ...] | None, gate: slice
) -> None:
    shapes = {name: shape} | ({name.replace("gate_up_proj", "down_proj"): down} if down else {})
    base = {f"model.layers.0.{key}": torch.zeros(size) for key, size in shapes.items()}
    models = Models(base, [{n: b + 2 for n, b in base.items()}], {n: torch.ones_like(b) for n, b in base.items()})
    if len(shape) == 1:
        models = with_a_matrix(models)  # to be scored by
    expected = {key: torch.ones_like(tensor) for key, tensor in models.base.items()}
    rows = expected[f"model.layers.0.{name}"]
    rows[(..., gate, ALL) if len(shape) > 1 else gate] = 0.6
    close(merge("fim_ta", models, gate_factor=0.6).tensors, expected)
    close(naive_fim(models.base, models.experts, models.fisher, **(TA | {"gate_factor": 0.6})).merged, expected)


def with_a_matrix(models: Models) -> Models:
    """The models and another matrix in block 0, with a task vector of 2."""
    more = {f"model.layers.0.{Q}": torch.zeros(1, 2)}
    return Models(
        models.base | more,
        [expert | {n: t + 2 for n, t in more.items()} for expert in models.experts],
        models.fisher | {n: t + 1 for n, t in more.items()},
    )


def test_a_fused_gate_by_hand() -> None:
    """Coefficient 0.5, and 0.7 * 0.5 for the gates: row 0 of [2, 2], rows 0 and 2 of the stack [2, 2, 1]."""
    prefix = "model.layers.0.mlp."
    deltas = {
        "gate_up_proj.weight": [[2.0, -2.0], [4.0, 1.0]],
        "down_proj.weight": [[0.0], [0.0]],
        "experts.gate_up_proj": [[[2.0], [2.0]], [[4.0], [4.0]]],
        "experts.down_proj": [[[0.0]], [[0.0]]],
    }
    base = {prefix + name: torch.ones_like(torch.tensor(delta)) for name, delta in deltas.items()}
    tuned = {prefix + name: 1 + torch.tensor(delta) for name, delta in deltas.items()}
    models = Models(base, [tuned], {name: torch.ones_like(tensor) for name, tensor in base.items()})
    plain = merge("fim_ties", models, density=1.0, norm_tolerance="off")
    expected = {
        "gate_up_proj.weight": [[1.7, 0.3], [3.0, 1.5]],
        "down_proj.weight": [[1.0], [1.0]],
        "experts.gate_up_proj": [[[1.7], [2.0]], [[2.4], [3.0]]],
        "experts.down_proj": [[[1.0]], [[1.0]]],
    }
    close(plain.tensors, {prefix + name: torch.tensor(values) for name, values in expected.items()})
    fused = {"coefficient": [0.5], "gate_coefficient": [0.35], "kept": [4]}
    assert plain.reports == {
        prefix + "gate_up_proj.weight": fused,
        prefix + "down_proj.weight": {"coefficient": [0.5], "kept": [2]},
        prefix + "experts.gate_up_proj": fused,
        prefix + "experts.down_proj": {"coefficient": [0.5], "kept": [2]},
    }

    name = prefix + "experts.gate_up_proj"  # of one column: its output norm is its own, whatever the probes
    ratio = math.sqrt((1.7**2 + 2.0**2 + 2.4**2 + 3.0**2) / 4)
    calibrated = merge("fim_ties", models, density=1.0)
    torch.testing.assert_close(calibrated.tensors[name], torch.tensor(expected["experts.gate_up_proj"]) / ratio)
    assert calibrated.reports[name] == fused | {"norm_ratio": pytest.approx(ratio, rel=1e-6), "rescaled": True}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("options", [{}, {"gate_factor": 0.0}, {"density": 1.0}, {"norm_tolerance": 0.0}], ids=str)
def test_fused_gates_equal_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts, extra=FUSED_SHAPES)
    merged = merge("fim_ties", models, **options)
    assert_like_naive(merged, naive_fim(models.base, models.experts, models.fisher, **options), trims=True)
    fused = {name for name, entry in merged.reports.items() if "gate_coefficient" in entry}
    assert fused == {name for name in FUSED_SHAPES if "gate_up_proj" in name}
    for name in fused:
        entry = merged.reports[name]
        factor = options.get("gate_factor", 0.7)
        assert entry["gate_coefficient"] == [factor * alpha for alpha in entry["coefficient"]]


@pytest.mark.parametrize("scope", ["tensor", "block"])
@pytest.mark.parametrize("elements", [1, 9, 16, 20, 31])
def test_fused_gates_in_row_blocks_of_any_size(elements: int, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2, extra=FUSED_SHAPES)
    whole = merge("fim_ties", models, trim_scope=scope)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    cut = merge("fim_ties", models, trim_scope=scope)
    assert all(torch.equal(cut.tensors[name], tensor) for name, tensor in whole.tensors.items())


@pytest.mark.parametrize("experts", [1, 2])
def test_a_fused_gate_has_the_bits_of_a_separate_one(experts: int) -> None:
    """[gate; up] fused, or as two tensors with the same coefficients."""
    fused, down = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    models = make_models(experts, blocks=1, extra={fused: (8, 6)})
    for tensors in (models.base, *models.experts, models.fisher):
        tensors[down] = tensors[down][:, :4].contiguous()

    def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        halves = dict(zip(("gate_proj", "up_proj"), tensors[fused].chunk(2), strict=True))
        return {n: t for n, t in tensors.items() if n != fused} | {
            fused.replace("gate_up_proj", half): tensor for half, tensor in halves.items()
        }

    apart = Models(split(models.base), [split(expert) for expert in models.experts], split(models.fisher))
    one, two = (merge("fim_ta", m, gate_factor=0.7).tensors for m in (models, apart))
    assert torch.equal(one[fused], torch.cat([two[fused.replace("gate_up_proj", h)] for h in ("gate_proj", "up_proj")]))


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("other", ["base", "mean", "finetuned", 0.25, -1])
def test_outside_the_blocks(other: str | float, experts: int) -> None:
    models = make_models(experts)
    merged = merge("fim_ties", models, other=other)
    alphas = [merged.alphas[3 * i : 3 * i + 3] for i in range(experts)]
    for name, base in models.base.items():
        if block_of(name) is not None:
            continue
        assert (name in merged.reports) is (other != "base")
        factors = {"mean": [sum(a) / 3 for a in alphas], "finetuned": [1.0] * experts, "base": [0.0] * experts}.get(
            str(other), [other] * experts
        )
        vectors = [c * (e[name].float() - base.float()) for c, e in zip(factors, models.experts, strict=True)]
        torch.testing.assert_close(merged.tensors[name], base.float() + disjoint_mean(vectors), rtol=1e-6, atol=1e-6)
        if other != "base":
            assert merged.reports[name] == {"coefficient": pytest.approx(factors)}
    untouched = merge("fim_ties", models)
    close(
        {name: t for name, t in merged.tensors.items() if block_of(name) is not None},
        {name: t for name, t in untouched.tensors.items() if block_of(name) is not None},
    )


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize(("parameter_count", "density"), [(2_999_999_999, 0.2), (3_000_000_000, 0.4)])
def test_automatic_density(method: str, parameter_count: int, density: float) -> None:
    resolved = resolve(method, experts=2, parameter_count=parameter_count, density=["auto", 0.9])
    assert [expert["density"] for expert in resolved.experts] == [density, 0.9]
    if method == "fim_ties":
        models = one_matrix([float(i) for i in range(10)])
        merged = merge(method, models, parameter_count=parameter_count)
        assert merged.reports[f"model.layers.0.{Q}"]["kept"] == [10 * density]
        assert int(merged.tensors[f"model.layers.0.{Q}"].count_nonzero()) == 10 * density


# ---- Degenerate models ------------------------------------------------------------------------------------------

ALL_OPTIONS = [
    {},
    {"importance": "quadratic", "trim": "quadratic"},
    {"importance": "fim", "granularity": "tensor"},
    {"importance": "norm", "trim": "magnitude", "trim_scope": "block"},
    {"theta": 5.0, "norm_tolerance": 0.0, "other": "mean"},
]


def changed(models: Models, what: str, block: int | None) -> Models:
    """The models with the Fisher, the task vectors or the base zero in one block, or (None) everywhere."""
    named = {name for name in models.base if block is None or block_of(name) == block}
    zero = {name: torch.zeros_like(models.base[name]) for name in named}
    if what == "fisher":
        return Models(models.base, models.experts, models.fisher | zero)
    if what == "task vector":
        same = {name: models.base[name] for name in named}
        return Models(models.base, [expert | same for expert in models.experts], models.fisher)
    return Models(models.base | zero, models.experts, models.fisher)


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("block", [0, 1, None])
@pytest.mark.parametrize("what", ["fisher", "task vector", "base"])
def test_zeros_give_a_finite_result(
    method: str, options: dict[str, Any], experts: int, block: int | None, what: str
) -> None:
    models = changed(make_models(experts), what, block)
    merged = merge(method, models, **options)
    assert all(tensor.isfinite().all() for tensor in merged.tensors.values())
    assert all(0.5 <= alpha <= 1 for alpha in merged.alphas)
    if what == "task vector":
        for name in models.base:
            if block is None or block_of(name) == block:
                assert torch.equal(merged.tensors[name], models.base[name].float()), name


@pytest.mark.parametrize("what", ["fisher", "task vector"])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_block_without_importance_counts_as_the_least_important(what: str, experts: int) -> None:
    models = changed(make_models(experts), what, 1)
    merged = merge("fim_ties", models)
    assert_like_naive(merged, naive_fim(models.base, models.experts, models.fisher), trims=True)
    for i in range(experts):
        rows = merged.blocks[3 * i : 3 * i + 3]
        assert rows[1]["score"] is None and rows[1]["alpha"] == LEAST
        assert sorted(row["alpha"] for row in rows) == [MOST, LEAST, LEAST]


@pytest.mark.parametrize("what", ["fisher", "task vector"])
def test_no_block_has_any_importance(what: str) -> None:
    merged = merge("fim_ties", changed(make_models(1), what, None))
    assert [(row["score"], row["alpha"]) for row in merged.blocks] == [(None, 0.5)] * 3


@pytest.mark.parametrize("theta", ["adaptive", 3.0])
def test_a_single_block_and_equal_scores(theta: float | str) -> None:
    assert merge("fim_ta", make_models(1, blocks=1), theta=theta).alphas == [0.5]
    models = make_models(1, blocks=1)
    for tensors in (models.base, *models.experts, models.fisher):
        tensors.update({name.replace("layers.0.", "layers.1."): tensor for name, tensor in tensors.items()})
    merged = merge("fim_ta", models, theta=theta)
    assert merged.alphas == [0.5, 0.5]


def test_blocks_are_listed_by_number() -> None:
    merged = merge("fim_ta", make_models(2, blocks=11))
    assert [row["block"] for row in merged.blocks] == [*range(11), *range(11)]


def test_there_are_no_blocks() -> None:
    with pytest.raises(CheckpointError, match="no decoder blocks"):
        resolve("fim_ties").method.prepared({}, None)


# ---- Parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"densty": 0.2}, "has no parameter 'densty': did you mean 'density'"),
        ({"density": 1.5}, "model ft0: .*density.*between 0 and 1.*1.5"),
        ({"density": -0.1}, "model ft0: .*density.*between 0 and 1"),
        ({"density": "most"}, "model ft0: .*density.*'most'"),
        ({"theta": -1}, "theta.*negative"),
        ({"theta": "steep"}, "theta.*'steep'"),
        ({"norm_tolerance": -0.05}, "norm_tolerance.*negative"),
        ({"gate_factor": -1}, "gate_factor.*greater than or equal to 0"),
        ({"importance": "hessian"}, "importance.*'product', 'fim', 'norm' or 'quadratic'"),
        ({"trim": "random"}, "trim.*'random'"),
        ({"trim_scope": "model"}, "trim_scope.*'model'"),
        ({"granularity": "row"}, "granularity.*'row'"),
        ({"other": "expert"}, "other.*'expert'"),
        ({"other": math.inf}, "other.*finite"),
    ],
)
def test_bad_parameters(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"method {method}.*{message}"):
        resolve(method, **parameters)


def test_numbers_may_be_written_as_text() -> None:
    parameters = resolve("fim_ties", theta="0.3", other="0.5", norm_tolerance="0.1", density="0.4")
    assert [parameters.parameters[key] for key in ("theta", "other", "norm_tolerance")] == [0.3, 0.5, 0.1]
    assert parameters.experts[0]["density"] == 0.4


def test_defaults_of_fim_ta() -> None:
    parameters = resolve("fim_ta").parameters
    assert (parameters["trim"], parameters["gate_factor"], parameters["norm_tolerance"]) == ("none", 1.0, "off")
