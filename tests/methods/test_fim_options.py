"""FIM-TIES and FIM-TA: every option against its formula."""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from methods.driver import Models, make_models, matrices_of, merge, resolve
from methods.fim_truth import BIAS, GATE, PLAIN, Q, close, one_matrix, two_blocks
from naive import block_alphas, block_of, disjoint_mean, keep_count, naive_fim, top_k_mask
from torch import Tensor


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
