"""Fisher-weighted averaging: by hand, against a naive version in float64, and with Fishers that are hardly there."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from methods.driver import Models, Tensors, make_models, matrices_of, merge, resolve

from streammerge.errors import CheckpointError, RecipeError

ONE, TWO, OUTSIDE = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def rows(**values: list[float]) -> Tensors:
    """Matrices of one row."""
    names = {"one": ONE, "two": TWO}
    return {names[key]: torch.tensor([row]) for key, row in values.items()}


def averaged(models: Models, name: str = ONE, **parameters: Any) -> list[float]:
    return merge("fisher_average", models, **parameters).tensors[name].flatten().tolist()


PLAIN: dict[str, Any] = {"normalize_fishers": False, "fisher_floor": 0.0}
PAIR = Models(rows(one=[1.0, 2.0]), [rows(one=[3.0, -2.0])], rows(one=[1.0, 3.0]), [rows(one=[3.0, 1.0])])
UNKNOWN = replace(PAIR, fisher=rows(one=[0.0, 0.0]), fishers=[rows(one=[0.0, 2.0])])


@pytest.mark.parametrize(
    ("models", "parameters", "expected"),
    [
        (PAIR, PLAIN, [2.5, 1.0]),  # (1 * 1 + 3 * 3) / (1 + 3) and (3 * 2 + 1 * -2) / (3 + 1)
        (PAIR, {**PLAIN, "coefficient": 2}, [19 / 7, 2 / 5]),  # (1 + 6 * 3) / (1 + 6) and (6 + 2 * -2) / (3 + 2)
        (PAIR, {**PLAIN, "base_coefficient": 0}, [3.0, -2.0]),
        (PAIR, {**PLAIN, "coefficient": 0}, [1.0, 2.0]),
        # the floor lifts the base's Fisher alone: (2 * 1 + 3 * 3) / 5, (3 * 2 - 2) / 4
        (PAIR, {**PLAIN, "fisher_floor": 2}, [11 / 5, 1.0]),
        # nobody knows the first element: the mean, or with a floor the base; (0.5 * 2 + 2 * -2) / 2.5 for the second
        (UNKNOWN, PLAIN, [2.0, -2.0]),
        (UNKNOWN, {**PLAIN, "coefficient": 3}, [2.5, -2.0]),  # (1 + 3 * 3) / 4
        (UNKNOWN, {**PLAIN, "fisher_floor": 0.5}, [1.0, -1.2]),
        (UNKNOWN, {**PLAIN, "fisher_floor": 0.5, "base_coefficient": 0}, [3.0, -2.0]),  # a floor for nobody
    ],
)
def test_by_hand(models: Models, parameters: dict[str, Any], expected: list[float]) -> None:
    merged = merge("fisher_average", models, **parameters).tensors[ONE]
    assert merged.flatten().tolist() == pytest.approx(expected, rel=1e-6)


TRIPLE = Models(
    rows(one=[1.0, 2.0, 1.0], two=[1.0, 1.0, 1.0]),
    [rows(one=[3.0, -2.0, 7.0], two=[5.0, 7.0, 1.0])],
    rows(one=[3.0, 4.0, 0.0], two=[0.0, 12.0, 0.0]),  # norm 13
    [rows(one=[0.0, 10.0, 0.0], two=[24.0, 0.0, 0.0])],  # norm 26
)


def test_the_norms_are_those_of_the_whole_fisher() -> None:
    """F_0 / 13 = (3, 4, 0; 0, 12, 0) / 13 and F_1 / 26 = (0, 5, 0; 12, 0, 0) / 13."""
    no_floor = {"fisher_floor": 0.0}
    assert averaged(TRIPLE, ONE, **no_floor) == pytest.approx([1.0, (4 * 2 + 5 * -2) / 9, 4.0])
    assert averaged(TRIPLE, TWO, **no_floor) == pytest.approx([5.0, 1.0, 1.0])


def test_the_floor_is_below_the_stored_fisher_and_not_in_the_norm() -> None:
    """With a floor of 6.5: F_0 / 13 = (6.5, 6.5, 6.5; 6.5, 12, 6.5) / 13; the default is far below these numbers."""
    floor = {"fisher_floor": 6.5}
    assert averaged(TRIPLE, ONE, **floor) == pytest.approx([1.0, (6.5 * 2 + 5 * -2) / 11.5, 1.0])
    assert averaged(TRIPLE, TWO, **floor) == pytest.approx([(6.5 + 12 * 5) / 18.5, 1.0, 1.0])
    assert averaged(TRIPLE, TWO) == pytest.approx([5.0, 1.0, 1.0], rel=1e-6)
    assert averaged(TRIPLE, ONE)[2] == 1.0  # by the default floor the base decides where no Fisher is positive


def naive(models: Models, coefficients: list[float], normalize: bool, floor: float) -> Tensors:
    """Everything in float64, each sum as it is written."""
    states, fishers = [models.base, *models.experts], [models.fisher, *models.fishers]
    matrices = matrices_of(models)
    weights = list(coefficients)
    if normalize:
        norms = [sum(f[name].double().square().sum() for name in matrices) ** 0.5 for f in fishers]
        weights = [c / float(norm) for c, norm in zip(coefficients, norms, strict=True)]
    merged = {}
    for name in models.base:
        values = torch.stack([state[name].double() for state in states])
        even = [torch.full(values[0].shape, c, dtype=torch.float64) for c in coefficients]
        sure = even
        if name in matrices:
            sure = [w * f[name].double() for w, f in zip(weights, fishers, strict=True)]
            sure[0] = weights[0] * fishers[0][name].double().clamp(min=floor)
        products, total = (torch.stack(sure) * values).sum(0), torch.stack(sure).sum(0)
        mean = (torch.stack(even) * values).sum(0) / torch.stack(even).sum(0)
        merged[name] = torch.where(total > 0, products / total, mean)
    return merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-4])
def test_equals_the_naive_version(dtype: torch.dtype, normalize: bool, floor: float) -> None:
    models = make_models(3, dtype=dtype)
    models.fisher[ONE.replace("up_proj", "gate_proj")][2] = 0
    for fisher in models.fishers:
        fisher[ONE.replace("up_proj", "gate_proj")][1:3] = 0
    parameters = {"base_coefficient": 0.5, "coefficient": [1.0, 2.0, 0.25]}
    merged = merge("fisher_average", models, normalize_fishers=normalize, fisher_floor=floor, **parameters)
    expected = naive(models, [0.5, 1.0, 2.0, 0.25], normalize, floor)
    assert merged.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged.tensors[name].double(), tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert merged.reports[OUTSIDE]["coefficient"] == pytest.approx([1 / 3.75, 2 / 3.75, 0.25 / 3.75])
    assert merged.reports["model.layers.0.mlp.down_proj.weight"]["coefficient"] == [1.0, 2.0, 0.25]


def test_of_equal_fishers_it_is_linear() -> None:
    models = make_models(2)
    models = replace(models, fishers=[models.fisher] * 2)
    merged = merge("fisher_average", models, coefficient=[0.5, 2], fisher_floor=0)
    expected = merge("linear", models, coefficient=[0.5, 2])
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e-38, 1e-44, 1e30])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_fisher_of_any_size_weighs(size: float, normalize: bool) -> None:
    """Products with changes of 1e-6 that float32 could not hold; the weights are 1 : 3 and 3 : 1."""
    fishers = [rows(one=[size, 3 * size]), rows(one=[3 * size, size])]
    exact = [fisher[ONE].double().flatten().tolist() for fisher in fishers]  # 1e-44 is 7 of the smallest float32
    models = Models(rows(one=[0.0, 0.0]), [rows(one=[1e-6, -1e-6])], fishers[0], [fishers[1]])
    found = averaged(models, normalize_fishers=normalize, fisher_floor=0)
    shares = [b / (a + b) for a, b in zip(*exact, strict=True)]
    assert found == pytest.approx([1e-6 * shares[0], -1e-6 * shares[1]], rel=1e-6)


def test_bfloat16_fishers_of_any_size_weigh() -> None:
    small = torch.tensor([[1e-20, 2e-39]], dtype=torch.bfloat16)
    models = Models(
        {ONE: torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)},
        [{ONE: torch.tensor([[2.0, 2.0]], dtype=torch.bfloat16)}],
        {ONE: small},
        [{ONE: 3 * small}],
    )
    share = (3 * small).double() / (small.double() + (3 * small).double())
    found = averaged(models, normalize_fishers=False, fisher_floor=0)
    assert found == pytest.approx((1 + share).flatten().tolist(), rel=1e-6)


@pytest.mark.parametrize(("model", "name"), [(0, "the base model"), (2, "model ft1")])
def test_a_zero_fisher_has_no_norm(model: int, name: str) -> None:
    models = make_models(2)
    for values in [models.fisher, *models.fishers][model].values():
        values.zero_()
    with pytest.raises(CheckpointError, match=f"^{name}: its Fisher is zero .* normalize_fishers"):
        merge("fisher_average", models)
    merged = merge("fisher_average", models, **PLAIN)
    assert all(tensor.isfinite().all() for tensor in merged.tensors.values())


def test_no_coefficient_at_all() -> None:
    with pytest.raises(RecipeError, match="method fisher_average: the coefficients sum to 0"):
        resolve("fisher_average", base_coefficient=0, coefficient=0)
    for parameters in ({"base_coefficient": -1}, {"coefficient": -1}, {"fisher_floor": -1}):
        with pytest.raises(RecipeError, match=f"method fisher_average.*{next(iter(parameters))}"):
            resolve("fisher_average", **parameters)
