"""Karcher mean: by hand, against a float64 iteration over the vectors themselves, and where there is none."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, matrices_of, merge, resolve
from torch import Tensor

from streammerge.errors import CheckpointError, RecipeError


def of(*tensors: Tensor | list[float]) -> Models:
    """The first is the base."""
    values = [{"w": torch.as_tensor(tensor)} for tensor in tensors]
    return Models(values[0], values[1:], {})


def naive_karcher(tensors: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Exponential and logarithm on the vectors themselves, in float64, to convergence.

    Returns:
        The mean, and the coefficients of the vectors in it.
    """
    vectors = torch.stack([tensor.double().flatten() for tensor in tensors])
    norms = vectors.norm(dim=1)
    units, a = vectors / norms[:, None], torch.tensor(weights, dtype=torch.float64) / sum(weights)
    x = a / (a @ units).norm()
    for _ in range(300):
        mean = x @ units
        chords = (units - mean).norm(dim=1)
        angles = 2 * (chords / 2).clamp(max=1).asin()
        stretch = a * torch.where(angles > 0, angles / angles.sin(), 1.0)
        logs = units - mean + (chords.square() / 2)[:, None] * mean  # u_i - cos(angle) mean
        tangent, length = stretch @ logs, (stretch @ logs).norm()
        if length < 1e-13:
            break
        along = (stretch * (1 - chords.square() / 2)).sum()
        x = length.cos() * x + torch.special.sinc(length / math.pi) * (stretch - along * x)
        mean = length.cos() * mean + torch.special.sinc(length / math.pi) * tangent
        x = x / mean.norm()
    scale = a @ norms
    return (scale * (x @ units)).view(tensors[0].shape), scale * x / norms


def fan(count: int, angle: float, elements: int = 64) -> list[Tensor]:
    """Vectors of other lengths, not all in one plane, the widest angle between two of them this one; float64."""
    generator = torch.Generator().manual_seed(count)
    axes, _ = torch.linalg.qr(torch.randn(elements, 3, generator=generator, dtype=torch.float64))
    vectors = []
    for i in range(count):
        turn = angle * i / (count - 1)
        tilt = 0.3 * math.sin(angle / 4) * math.sin(3.0 * i) if 0 < i < count - 1 else 0.0
        unit = math.cos(turn) * axes[:, 0] + math.sin(turn) * axes[:, 1] + tilt * axes[:, 2]
        vectors.append((1 + 0.25 * i) * unit / unit.norm())
    return vectors


def test_by_hand() -> None:
    """(1, 0) and (0, 3): the direction between them times the mean length 2."""
    merged = merge("karcher", of([1.0, 0.0], [0.0, 3.0]))
    root = math.sqrt(0.5)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([2 * root, 2 * root]))
    report = merged.reports["w"]
    assert report["base_coefficient"] == pytest.approx(2 * root)
    assert report["coefficient"] == pytest.approx([2 * root / 3])
    assert report["angle"] == pytest.approx(math.pi / 2)
    assert (report["iterations"], report["converged"]) == (0, True)


def test_weights_by_hand() -> None:
    """Two points, weights 1 and 2: two thirds of the way along the arc, at 60 degrees; the length (1 + 2 * 4) / 3."""
    merged = merge("karcher", of([1.0, 0.0], [0.0, 4.0]), coefficient=2)
    torch.testing.assert_close(merged.tensors["w"], 3 * torch.tensor([0.5, math.sqrt(0.75)]))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.02, 0.5, 1.5, 2.5, 3.0])
@pytest.mark.parametrize("equal", [True, False])
def test_equals_the_float64_iteration(count: int, angle: float, equal: bool) -> None:
    tensors = fan(count, angle)
    weights = [1.0] * count if equal else [0.5 + 0.3 * i for i in range(count)]
    expected, coefficients = naive_karcher(tensors, weights)
    merged = merge("karcher", of(*tensors), base_coefficient=weights[0], coefficient=weights[1:])
    report = merged.reports["w"]
    assert report["converged"]
    assert report["angle"] == pytest.approx(angle, rel=1e-3 if angle < 1e-5 else 1e-6)
    assert [report["base_coefficient"], *report["coefficient"]] == pytest.approx(coefficients.tolist(), rel=1e-7)
    assert float((merged.tensors["w"] - expected).norm() / expected.norm()) < 1e-11


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.02, 0.5, 1.5, 2.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_is_averaged_to_a_millionth(dtype: torch.dtype, angle: float, count: int) -> None:
    """The truth starts from the rounded vectors; in bfloat16 the angles between them are those of the rounding."""
    tensors = [vector.to(dtype) for vector in fan(count, angle, 4096)]
    expected, coefficients = naive_karcher(tensors, [1.0] * count)
    merged = merge("karcher", of(*tensors))
    report = merged.reports["w"]
    assert report["converged"]
    assert [report["base_coefficient"], *report["coefficient"]] == pytest.approx(coefficients.tolist(), rel=1e-6)
    assert float((merged.tensors["w"] - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_reference(dtype: torch.dtype) -> None:
    models = make_models(3, dtype=dtype)
    merged = merge("karcher", models, base_coefficient=0.3, coefficient=[0.9, 0.1, 2.0])
    for name, tensor in merged.tensors.items():
        inputs = [models.base[name], *(expert[name] for expert in models.experts)]
        torch.testing.assert_close(tensor, naive_karcher(inputs, [0.3, 0.9, 0.1, 2.0])[0].float(), rtol=1e-6, atol=1e-6)


def test_bfloat16_does_not_collapse_to_the_normalised_mean() -> None:
    """Three vectors, two of them close: at some 0.02 rad the Karcher mean and the normalised mean differ by the cube of
    the angle, which a cosine in bfloat16 or float32 cannot tell; the coefficients have it."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(64, 512, generator=generator).to(torch.bfloat16)
    far = (base.float() + 0.02 * torch.randn(64, 512, generator=generator)).to(torch.bfloat16)
    near = (base.float() + 0.004 * torch.randn(64, 512, generator=generator)).to(torch.bfloat16)
    models = of(base, near, far)
    _, coefficients = naive_karcher([base, near, far], [1.0, 1.0, 1.0])
    report = merge("karcher", models).reports["w"]
    mean = merge("karcher", models, max_iter=0).reports["w"]
    found = torch.tensor([report["base_coefficient"], *report["coefficient"]], dtype=torch.float64)
    plain = torch.tensor([mean["base_coefficient"], *mean["coefficient"]], dtype=torch.float64)
    assert 0.015 < report["angle"] < 0.025
    assert report["iterations"] > 0
    assert mean["iterations"] == 0
    assert not mean["converged"]
    away = float((plain - coefficients).abs().max())
    assert 1e-6 < away < 1e-3
    assert float((found - coefficients).abs().max()) < 1e-5 * away


def test_without_the_base_it_is_the_mean_of_the_others() -> None:
    x, y, z = fan(3, 1.0)
    merged = merge("karcher", of(x, y, z), base_coefficient=0)
    torch.testing.assert_close(merged.tensors["w"], naive_karcher([y, z], [1, 1])[0], rtol=1e-12, atol=1e-12)
    assert merged.reports["w"]["base_coefficient"] == 0
    assert torch.equal(merge("karcher", of(x, y), base_coefficient=0).tensors["w"], y)
    assert torch.equal(merge("karcher", of(x, y), coefficient=0).tensors["w"], x)


def test_the_norm_is_the_mean_of_the_norms() -> None:
    models = make_models(2, dtype=torch.float32)
    for name, tensor in merge("karcher", models).tensors.items():
        norms = [float(model[name].norm()) for model in (models.base, *models.experts)]
        assert float(tensor.norm()) == pytest.approx(sum(norms) / 3, rel=1e-6)


@pytest.mark.parametrize("angle", [1e-6, 0.5, 3.0])
def test_coefficients_of_equal_lengths_sum_to_at_least_one(angle: float) -> None:
    """A combination of unit vectors that has length 1 needs a sum of 1 / cos of half their spread, for two."""
    x, y = (vector / vector.norm() for vector in fan(2, angle))
    report = merge("karcher", of(x, y)).reports["w"]
    assert report["base_coefficient"] + report["coefficient"][0] == pytest.approx(1 / math.cos(angle / 2), rel=1e-10)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[0.0, 0.0], [2.0, 4.0]], [1.0, 2.0]),  # the mean norm, the only direction
        ([[2.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.5, 1.0]),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], [1.0, 2.0]),
        ([[1.0, 2.0], [3.0, 6.0]], [2.0, 4.0]),  # collinear
        ([2.0, -4.0], -1.0),  # one element: the linear mean
        ([[2.0], [4.0]], [3.0]),
        ([[[1.0]], [[-1.0]]], [[0.0]]),
        ([[], []], []),
    ],
)
def test_degenerate(tensors: list[Any], expected: Any) -> None:
    merged = merge("karcher", of(*(torch.tensor(tensor) for tensor in tensors))).tensors["w"]
    torch.testing.assert_close(merged, torch.tensor(expected))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale(scale: float) -> None:
    merged = merge("karcher", of([scale, 0.0], [0.0, 3 * scale])).tensors["w"]
    torch.testing.assert_close(merged / scale, torch.full((2,), math.sqrt(2.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("tensors", "parameters", "who"),
    [
        ([[1.0, 2.0], [-1.0, -2.0]], {}, "the models"),
        ([[1.0, 2.0], [-3.0, -6.0]], {"coefficient": 0.25}, "ft0"),
        ([[1.0, 2.0], [-3.0, -6.0]], {"coefficient": 4}, "the base"),
        ([[1.0, 0.0], [-1.0, 1e-4]], {"coefficient": 0.25}, "ft0"),
        ([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]], {}, "the models"),
    ],
)
def test_opposite_directions(tensors: list[list[float]], parameters: dict[str, Any], who: str) -> None:
    with pytest.raises(CheckpointError, match=f"^tensor 'w': {who} and the mean of all point in opposite directions"):
        merge("karcher", of(*tensors), **parameters)


def test_blocks() -> None:
    """A decoder block's tensors are one long vector; what lies outside the blocks is merged tensor by tensor."""
    models = make_models(2, blocks=2, dtype=torch.float32)
    whole, each = merge("karcher", models, granularity="block"), merge("karcher", models)
    for block in range(2):
        names = [name for name in models.base if name.startswith(f"model.layers.{block}.")]
        inputs = [torch.cat([m[n].flatten() for n in names]) for m in (models.base, *models.experts)]
        expected = naive_karcher(inputs, [1, 1, 1])[0].float()
        found = torch.cat([whole.tensors[name].flatten() for name in names])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert len({str(whole.reports[name]) for name in names}) == 1
    outside = [name for name in models.base if "layers" not in name]
    assert all(torch.equal(whole.tensors[name], each.tensors[name]) for name in outside)
    assert all(not torch.equal(whole.tensors[name], each.tensors[name]) for name in matrices_of(models))
    flipped = Models(models.base, [{name: -tensor for name, tensor in models.base.items()}], {})
    with pytest.raises(CheckpointError, match=r"^block 0 \(tensor 'model.layers.0.*' and others\)"):
        merge(
            "karcher",
            Models({n: t for n, t in flipped.base.items() if "layers" in n}, flipped.experts, {}),
            granularity="block",
        )


def test_few_iterations() -> None:
    tensors = fan(5, 2.5)
    runs = [merge("karcher", of(*tensors), max_iter=count).reports["w"] for count in (0, 1, 1000)]
    assert [run["converged"] for run in runs] == [False, False, True]
    assert [run["iterations"] for run in runs[:2]] == [0, 1]
    assert 1 < runs[2]["iterations"] < 100
    assert merge("karcher", of(*tensors), tol=0.1).reports["w"]["iterations"] < runs[2]["iterations"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"coefficient": 0, "base_coefficient": 0}, "method karcher: the coefficients sum to 0"),
        ({"coefficient": -1}, "method karcher, model ft0: coefficient: .*0"),
        ({"base_coefficient": -1}, "method karcher: base_coefficient: .*0"),
        ({"granularity": "layer"}, "method karcher: granularity: .*'tensor' or 'block'"),
        ({"max_iter": -1}, "method karcher: max_iter"),
        ({"tol": 0}, "method karcher: tol"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("karcher", **parameters)
