"""multislerp: by hand, against float64 in memory with the tangent step that vanishes, and degenerate inputs."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from torch import Tensor

from streammerge.errors import RecipeError

ROOT = math.sqrt(0.5)


def of(*tensors: Any) -> Models:
    """The first is the base."""
    values = [{"w": torch.as_tensor(tensor)} for tensor in tensors]
    return Models(values[0], values[1:], {})


def naive_multislerp(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """With the tangent step, in float64."""
    flat = torch.stack([vector.double().flatten() for vector in vectors])
    a = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    norms = flat.norm(dim=1)
    units = flat / norms[:, None]
    mean = a @ units / (a @ units).norm()
    tangent = a @ (units - (units @ mean)[:, None] * mean)
    length = tangent.norm()
    assert length < 1e-14, "the step is not zero"
    merged = (a @ norms) * (length.cos() * mean + torch.special.sinc(length / math.pi) * tangent)
    return merged.view(vectors[0].shape)


def test_by_hand() -> None:
    """Task vectors (2, 0) and (0, 4): the direction (1, 1) / sqrt 2, the mean length 3."""
    merged = merge("multislerp", of([1.0, 1.0], [3.0, 1.0], [1.0, 5.0]))
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([1 + 3 * ROOT, 1 + 3 * ROOT]))
    report = merged.reports["w"]
    assert report["coefficient"] == pytest.approx([1.5 * ROOT, 0.75 * ROOT])
    assert report["angle"] == pytest.approx(math.pi / 2)
    assert report["linear"] is False


def test_without_the_base_by_hand() -> None:
    merged = merge("multislerp", of([9.0, 9.0], [2.0, 0.0], [0.0, 4.0]), task_vectors=False)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([3 * ROOT, 3 * ROOT]))


def test_weights_that_are_not_normalised() -> None:
    """(2, 0) and (0, 4) with weights 2 and 2: the same direction, the length 2 * 2 + 2 * 4."""
    merged = merge("multislerp", of([0.0, 0.0], [2.0, 0.0], [0.0, 4.0]), coefficient=2, normalize_weights=False)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([12 * ROOT, 12 * ROOT]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("task_vectors", [True, False])
def test_equals_the_naive_reference(dtype: torch.dtype, task_vectors: bool) -> None:
    models = make_models(3, dtype=dtype)
    merged = merge("multislerp", models, coefficient=[0.2, 1.0, 0.5], task_vectors=task_vectors)
    for name, tensor in merged.tensors.items():
        base, *experts = (model[name].float() for model in (models.base, *models.experts))
        origin = base if task_vectors else torch.zeros_like(base)
        expected = origin + naive_multislerp([expert - origin for expert in experts], [0.2, 1.0, 0.5])
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "parameters", "expected", "linear"),
    [
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], {}, [1.0, 2.0], True),  # no task vectors
        ([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], {}, [1.5, 2.0], False),  # the only direction, half the length
        ([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], {}, [4.5, 6.0], False),  # collinear
        ([[1.0, 1.0], [4.0, 5.0]], {}, [4.0, 5.0], False),  # one model is itself
        ([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]], {}, [0.0, 0.0], True),  # antipodal
        ([[0.0, 0.0], [3.0, 4.0], [-9.0, -12.0]], {}, [-3.0, -4.0], True),
        ([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]], {"coefficient": [3, 1]}, [3.0, 4.0], False),
        ([[0.0, 0.0], [3.0, 4.0], [3e-9, 0.0]], {}, [1.5, 2.0], False),  # shorter than eps
        ([1.0, 3.0, -3.0], {}, 0.0, True),
        ([[[1.0]], [[3.0]], [[5.0]]], {}, [[4.0]], True),
        ([[], [], []], {}, [], True),
    ],
)
def test_degenerate(tensors: list[Any], parameters: dict[str, Any], expected: Any, linear: bool) -> None:
    merged = merge("multislerp", of(*tensors), **parameters)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor(expected))
    assert merged.reports["w"]["linear"] is linear


def test_bad_parameters() -> None:
    with pytest.raises(RecipeError, match="method multislerp: the coefficients sum to 0.*normalize_weights"):
        resolve("multislerp", experts=2, coefficient=[1, -1])
    with pytest.raises(RecipeError, match="method multislerp: eps"):
        resolve("multislerp", eps=-1)
