"""The Karcher mean with lengths and angles by the Fisher: by hand, and against the mean of sqrt(F) theta_i."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.driver import Models, context_of, make_models, matrices_of, merge, resolve
from methods.test_karcher import fan, naive_karcher
from test_engine import load, model, save, save_fisher
from torch import Tensor

import streammerge
from streammerge.errors import RecipeError
from streammerge.methods import api

MATRIX = "model.layers.0.mlp.down_proj.weight"


def in_a_block(fisher: list[float], *rows: list[float]) -> Models:
    """A matrix of one row in a decoder block; the first is the base's."""
    values = [{MATRIX: torch.tensor([row])} for row in rows]
    return Models(values[0], values[1:], {MATRIX: torch.tensor([fisher])})


def naive_by_fisher(tensors: Sequence[Tensor], fisher: Tensor, weights: Sequence[float]) -> Tensor:
    """The mean of the vectors sqrt(F) theta_i in float64; its coefficients, on the theta_i."""
    _, coefficients = naive_karcher([fisher.double().sqrt() * tensor.double() for tensor in tensors], weights)
    merged = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        merged += coefficient * tensor.double()
    return merged


def naive_blocks(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], fisher: Mapping[str, Tensor], pooled: bool
) -> dict[str, Tensor]:
    """Every tensor's mean; with `pooled`, of a block's matrices as one long vector."""
    contexts = [context_of(name, tensor) for name, tensor in base.items()]
    groups: dict[Any, list[str]] = {}
    for context in contexts:
        matrix = context.block is not None and context.is_matrix
        groups.setdefault(context.block if pooled and matrix else context.name, []).append(context.name)
    merged = {}
    for names in groups.values():
        inputs = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (base, *models)]
        weights = [torch.cat([fisher[name].flatten() for name in names])] if names[0] in fisher else None
        ones = [1.0] * len(inputs)
        mean = naive_by_fisher(inputs, weights[0], ones) if weights else naive_karcher(inputs, ones)[0]
        for name, part in zip(names, mean.split([base[name].numel() for name in names]), strict=True):
            merged[name] = part.view(base[name].shape).float()
    return merged


def test_by_hand_with_the_fisher() -> None:
    """F = (9, 16): (1, 1) and (1, -1) are both 5 long, their product is 9 - 16. Their sum (2, 0) is 6 long, so the mean
    is 5/6 of it. Without F they are at a right angle and the mean is (sqrt 2, 0)."""
    models = in_a_block([9.0, 16.0], [1.0, 1.0], [1.0, -1.0])
    merged = merge("karcher", models, precondition=True)
    torch.testing.assert_close(merged.tensors[MATRIX], torch.tensor([[5 / 3, 0.0]]))
    assert merged.reports[MATRIX] == {
        "base_coefficient": pytest.approx(5 / 6),
        "coefficient": [pytest.approx(5 / 6)],
        "angle": pytest.approx(math.acos(-7 / 25)),
        "iterations": 0,
        "converged": True,
        "metric": "fisher",
    }
    plain = merge("karcher", models)
    torch.testing.assert_close(plain.tensors[MATRIX], torch.tensor([[math.sqrt(2), 0.0]]))
    assert "metric" not in plain.reports[MATRIX]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.02, 0.5, 2.5])
def test_by_the_fisher_at_any_angle(angle: float, count: int) -> None:
    """The angles are those between sqrt(F) theta_i; a Fisher spans many orders of magnitude."""
    generator = torch.Generator().manual_seed(5)
    fisher = 10 ** (-12 * torch.rand(1, 64, generator=generator, dtype=torch.float64))
    tensors = [(vector / fisher.sqrt()[0]).view(1, 64) for vector in fan(count, angle)]
    weights = [0.5 + 0.3 * i for i in range(count)]
    models = Models({MATRIX: tensors[0]}, [{MATRIX: tensor} for tensor in tensors[1:]], {MATRIX: fisher})
    merged = merge("karcher", models, precondition=True, base_coefficient=weights[0], coefficient=weights[1:])
    expected = naive_by_fisher(tensors, fisher, weights)
    assert float((merged.tensors[MATRIX] - expected).norm() / expected.norm()) < 1e-9
    assert merged.reports[MATRIX]["angle"] == pytest.approx(angle, rel=1e-3 if angle < 1e-5 else 1e-6)
    norms = [float((fisher * tensor.square()).sum().sqrt()) for tensor in tensors]
    mean = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
    assert float((fisher * merged.tensors[MATRIX].square()).sum().sqrt()) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_the_matrices_of_blocks_are_measured_by_the_fisher(granularity: str, dtype: torch.dtype) -> None:
    models = make_models(2, dtype=dtype, extra={"model.layers.0.stack": (2, 5, 4)})
    matrices = set(matrices_of(models))
    models = Models(models.base, models.experts, {name: f for name, f in models.fisher.items() if name in matrices})
    merged = merge("karcher", models, precondition=True, granularity=granularity)
    expected = naive_blocks(models.base, models.experts, models.fisher, granularity == "block")
    for name, tensor in merged.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert merged.reports[name]["metric"] == ("fisher" if name in matrices else "euclidean")
    plain = merge("karcher", models)
    for name, tensor in plain.tensors.items():
        assert torch.equal(merged.tensors[name], tensor) is (name not in matrices), name


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_where_the_fisher_says_nothing_the_metric_is_euclidean(granularity: str) -> None:
    """Block 0 has a Fisher of zeros; so has one matrix of block 1, which as part of its block has a metric."""
    models = make_models(2, dtype=torch.float32)
    dead = "model.layers.1.mlp.gate_proj.weight"
    zeros = {name: torch.zeros_like(f) for name, f in models.fisher.items() if ".0." in name or name == dead}
    merged = merge(
        "karcher",
        Models(models.base, models.experts, models.fisher | zeros),
        precondition=True,
        granularity=granularity,
    )
    only = {name: f for name, f in models.fisher.items() if name in matrices_of(models)}
    alone = {name for name in zeros if granularity == "tensor" or ".0." in name}
    plain = {name: torch.ones_like(f) if name in alone else zeros.get(name, f) for name, f in only.items()}
    for name, expected in naive_blocks(models.base, models.experts, plain, granularity == "block").items():
        torch.testing.assert_close(merged.tensors[name], expected, rtol=1e-6, atol=1e-6)
        by_fisher = name in only and name not in alone
        assert merged.reports[name]["metric"] == ("fisher" if by_fisher else "euclidean"), name


@pytest.mark.parametrize(
    ("models", "expected", "metric"),
    [
        (in_a_block([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0]), [2**0.5, 2**0.5, 0.0], "euclidean"),
        # F is zero where any model is not: the same
        (in_a_block([0.0, 0.0, 5.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0]), [2**0.5, 2**0.5, 0.0], "euclidean"),
        (in_a_block([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), [0.0, 0.0, 0.0], "euclidean"),
        # only by the first entry: lengths 1 and 3, the same direction; the second entry has no length
        (in_a_block([1.0, 0.0, 0.0], [1.0, 5.0, 0.0], [3.0, 6.0, 0.0]), [2.0, 7.0, 0.0], "fisher"),
        # a model without length by F has no direction either, as a zero tensor: half the other's length
        (in_a_block([1.0, 0.0, 0.0], [0.0, 9.0, 0.0], [3.0, 6.0, 0.0]), [1.5, 3.0, 0.0], "fisher"),
        (in_a_block([4.0], [1.0], [-3.0]), [-1.0], "fisher"),  # one element: the linear mean
    ],
)
def test_a_fisher_of_zeros_by_hand(models: Models, expected: list[float], metric: str) -> None:
    merged = merge("karcher", models, precondition=True)
    torch.testing.assert_close(merged.tensors[MATRIX], torch.tensor([expected]))
    assert merged.reports[MATRIX]["metric"] == metric


def test_a_factor_of_the_fisher_changes_nothing() -> None:
    models = make_models(2, dtype=torch.float32)
    plain = merge("karcher", models)
    for factor in (2.0**-60, 1.0, 2.0**40):
        constant = {name: torch.full_like(f, factor) for name, f in models.fisher.items()}
        merged = merge("karcher", Models(models.base, models.experts, constant), precondition=True)
        assert all(torch.equal(merged.tensors[name], tensor) for name, tensor in plain.tensors.items())


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("elements", [1, 12, 37])
def test_by_the_fisher_in_row_blocks_of_any_size(
    elements: int, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = make_models(2)
    whole = merge("karcher", models, precondition=True, granularity=granularity)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    assert merge("karcher", models, precondition=True, granularity=granularity).reports == whole.reports


def test_what_needs_the_fisher() -> None:
    contexts = [context_of(name, tensor) for name, tensor in make_models().base.items()]
    plain, by_fisher = resolve("karcher").method, resolve("karcher", precondition=True).method
    assert (plain.needs_fisher, by_fisher.needs_fisher) == (False, True)
    assert not any(plain.reads_fisher(context) for context in contexts)
    assert [c.name for c in contexts if by_fisher.reads_fisher(c)] == matrices_of(make_models())


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_from_files_and_a_saved_fisher(granularity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "TILE_ELEMENTS", 64)
    base = save(model(0), tmp_path / "base")
    fisher = save_fisher(base, tmp_path / "fisher")
    job = {
        "base": base,
        "models": [save(model(seed), tmp_path / str(seed)) for seed in (1, 2)],
        "method": "karcher",
        "parameters": {"precondition": True, "granularity": granularity},
        "fisher_from": fisher,
    }
    result = streammerge.merge(job, tmp_path / "out")
    measured = load(Path(fisher))
    expected = naive_blocks(model(0), [model(1), model(2)], measured, granularity == "block")
    found = load(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert result["tensors"][name]["metric"] == ("fisher" if name in measured else "euclidean")
    with pytest.raises(RecipeError, match="uses no Fisher"):
        streammerge.merge({**job, "parameters": {}}, tmp_path / "other")
