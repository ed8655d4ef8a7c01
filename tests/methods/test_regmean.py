"""RegMean against the least-squares problem it solves, written out with whole Gram matrices."""

from collections.abc import Sequence

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from torch import Tensor

from streammerge.calibration.store import Calibrated, CalibrationRecord, CalibrationSettings, entry
from streammerge.errors import RecipeError


def with_inputs(base: Tensor, experts: Sequence[Tensor], inputs: Sequence[Tensor], name: str = "w") -> Models:
    stored = {entry("inputs", model, name): x for model, x in enumerate(inputs)}
    record = CalibrationRecord(
        version="0", settings=CalibrationSettings(), device="cpu", tensors=dict.fromkeys(stored, "memory")
    )
    calibrated = Calibrated(record, stored.__getitem__)
    return Models({name: base}, [{name: expert} for expert in experts], {}, [], calibrated)


def naive(weights: Sequence[Tensor], inputs: Sequence[Tensor], a: Sequence[float], off_diagonal: float) -> Tensor:
    """sum a W G (sum a G)^-1 with G = X'X / n, its entries off the diagonal times a factor; float64."""
    grams = []
    for x in inputs:
        gram = x.double().T @ x.double() / len(x)
        grams.append(off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal()))
    share = [value / sum(a) for value in a]
    left = sum(c * w.double() @ g for c, w, g in zip(share, weights, grams, strict=True))
    right = sum(c * g for c, g in zip(share, grams, strict=True))
    return torch.linalg.solve(right.T, left.T).T


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """One token each, x_0 = (1, 0) and x_1 = (1, 1), off-diagonal 1/2, weights w_0 = (0, 0) and w_1 = (1, 3):

    G_0 = [[1, 0], [0, 0]], G_1 = [[1, 1/2], [1/2, 1]]; w_1 G_1 = (5/2, 7/2); G_0 + G_1 = [[2, 1/2], [1/2, 1]],
    determinant 7/4; w = (5/2, 7/2) [[1, -1/2], [-1/2, 2]] 4/7 = (3/4, 23/4) 4/7 = (3/7, 23/7).
    """
    models = with_inputs(
        torch.zeros(1, 2), [torch.tensor([[1.0, 3.0]])], [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])]
    )
    merged = merge("regmean", models, off_diagonal=0.5)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([[3 / 7, 23 / 7]]))
    assert merged.reports["w"] == {"coefficient": [0.5], "tokens": 2}


@pytest.mark.parametrize("tokens", [1, 5, 40])  # fewer than the 12 channels, and more
@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("experts", [1, 3])
def test_equals_the_whole_gram_matrices(tokens: int, off_diagonal: float, experts: int) -> None:
    weights = [draw(7, 12, seed=i) for i in range(experts + 1)]
    inputs = [draw(tokens + i, 12, seed=10 + i) * (0.1 + torch.arange(12)) for i in range(experts + 1)]
    coefficients = [0.5, 1.0, 2.0, 0.0][: experts + 1]
    merged = merge(
        "regmean",
        with_inputs(weights[0], weights[1:], inputs),
        base_coefficient=coefficients[0],
        coefficient=coefficients[1:],
        off_diagonal=off_diagonal,
    )
    expected = naive(weights, inputs, coefficients, off_diagonal)
    torch.testing.assert_close(merged.tensors["w"].double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_the_least_squares_solution() -> None:
    """Nearer to the models' outputs, on their inputs, than the average and than any step away from it."""
    weights, inputs = [draw(4, 6, seed=i) for i in range(2)], [draw(30, 6, seed=10 + i) for i in range(2)]
    found = merge("regmean", with_inputs(weights[0], weights[1:], inputs), off_diagonal=0.999999).tensors["w"]

    def error(w: Tensor) -> float:
        pairs = zip(weights, inputs, strict=True)
        return sum(float((x @ (w - v).T).double().square().sum()) / len(x) for v, x in pairs)

    assert error(found) < error((weights[0] + weights[1]) / 2)
    for seed in range(5):
        assert error(found) < error(found + 0.05 * draw(4, 6, seed=50 + seed))


def test_the_models_own_outputs_are_kept_where_inputs_do_not_overlap() -> None:
    """Model 0 uses the first channels only and model 1 the others: each keeps its columns."""
    x = draw(20, 6)
    first, second = x.clone(), x.clone()
    first[:, 3:] = 0
    second[:, :3] = 0
    weights = [draw(2, 6, seed=1), draw(2, 6, seed=2)]
    merged = merge("regmean", with_inputs(weights[0], weights[1:], [first, second])).tensors["w"]
    torch.testing.assert_close(merged, torch.cat([weights[0][:, :3], weights[1][:, 3:]], 1))


def test_dead_channels_and_tensors_without_inputs_are_averaged() -> None:
    x = draw(9, 4)
    x[:, 2] = 0
    weights = [draw(3, 4, seed=1), draw(3, 4, seed=2)]
    models = with_inputs(weights[0], weights[1:], [x, x])
    torch.testing.assert_close(merge("regmean", models).tensors["w"][:, 2], (weights[0] + weights[1])[:, 2] / 2)
    for inputs in ([], [x], [x[:0], x[:0]]):
        merged = merge("regmean", with_inputs(weights[0], weights[1:], inputs))
        torch.testing.assert_close(merged.tensors["w"], (weights[0] + weights[1]) / 2)
        assert merged.reports["w"]["tokens"] == 0


def test_without_the_base() -> None:
    weights, inputs = [draw(3, 5, seed=i) for i in range(3)], [draw(8, 5, seed=10 + i) for i in range(3)]
    merged = merge("regmean", with_inputs(weights[0], weights[1:], inputs), base_coefficient=0)
    torch.testing.assert_close(
        merged.tensors["w"].double(), naive(weights[1:], inputs[1:], [1, 1], 0.9), rtol=1e-5, atol=1e-6
    )


def test_norms_and_biases_are_averaged() -> None:
    models = make_models(1)
    merged = merge("regmean", models)
    for name, tensor in models.base.items():
        if tensor.dim() < 2:
            expected = (tensor.double() + models.experts[0][name].double()) / 2
            torch.testing.assert_close(merged.tensors[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"coefficient": 0, "base_coefficient": 0}, "method regmean: the coefficients sum to 0"),
        ({"off_diagonal": 1.0}, "method regmean: off_diagonal"),
        ({"coefficient": -1}, "method regmean, model ft0: coefficient"),
    ],
)
def test_bad_parameters(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("regmean", **parameters)
