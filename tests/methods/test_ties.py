"""TIES: by hand in mergekit's convention, and against the naive reference."""

from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from naive import keep_count, naive_ties, top_k_mask
from torch import Tensor

from streammerge.errors import RecipeError


def of(*task_vectors: list[float], base: float = 0.0) -> Models:
    """A base of one value and the experts that have these task vectors."""
    vectors = [torch.tensor(vector) for vector in task_vectors]
    return Models({"w": torch.full_like(vectors[0], base)}, [{"w": vector + base} for vector in vectors], {})


def ties(models: Models, **parameters: Any) -> list[float]:
    return merge("ties", models, **parameters).tensors["w"].tolist()


THREE = of([3.0, -1.0], [-1.0, -1.0], [-1.0, 4.0])


def test_the_convention_is_mergekits() -> None:
    """Scaled task vectors (0.6, -0.2), (-1, -1), (-1, 4): their sum (-1.4, 2.8) elects (-, +).

    The agreeing ones, over their coefficients: (-1 - 1) / (1 + 1) = -1 and 4 / 1 = 4. Electing before scaling
    (peft) gives (0.6, 4), counting signs (sd-mecha) gives (-1, -1).
    """
    assert ties(THREE, density=1, coefficient=[0.2, 1, 1]) == [-1.0, 4.0]


@pytest.mark.parametrize(
    ("models", "parameters", "expected"),
    [
        # elected (-, +) as above, not divided: -2 and 4, halved
        (THREE, {"density": 1, "coefficient": [0.2, 1, 1], "normalize": False, "scale": 0.5}, [-1.0, 2.0]),
        # density 0.5 keeps (3, 0), (-1, 0), (0, 4), the first of equals: sum of y = (-0.4, 4)
        (THREE, {"density": 0.5, "coefficient": [0.2, 1, 1]}, [-1.0, 4.0]),
        # a density each: (3, 0), (-1, -1), nothing: sum = (2, -1)
        (THREE, {"density": [0.5, 1, 0]}, [3.0, -1.0]),
        # k = round(0.5 * 5) = 2: 5 and the first of the two 4; on top of the base
        (of([4.0, -5.0, 4.0, 1.0, 0.0], base=1.0), {"density": 0.5}, [5.0, -4.0, 1.0, 1.0, 1.0]),
        # with one expert the divisor cancels the coefficient, whatever its sign; `scale` acts
        (of([2.0, -2.0]), {"density": 1, "coefficient": -0.5}, [2.0, -2.0]),
        (of([2.0, -2.0]), {"density": 1, "coefficient": 0.5, "scale": 3}, [6.0, -6.0]),
        # a sum of zero counts as +; entries that are zero agree with nobody
        (of([-1.0, 0.0], [1.0, -2.0]), {"density": 1}, [1.0, -2.0]),
        # agreeing coefficients that cancel: y = (1, -1) and (2, 1); the divisor 1 - 1 = 0 counts as 1
        (of([1.0, -1.0], [-2.0, -1.0]), {"density": 1, "coefficient": [1, -1]}, [3.0, -1.0]),
        (of([1.0, 2.0], [3.0, 1.0]), {"density": 0}, [0.0, 0.0]),
        (of([1.0, 2.0], [3.0, 1.0]), {"density": 1, "coefficient": 0}, [0.0, 0.0]),
    ],
)
def test_by_hand(models: Models, parameters: dict[str, Any], expected: list[float]) -> None:
    assert merge("ties", models, **parameters).tensors["w"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize(
    ("experts", "parameters"),
    [
        (1, {"coefficients": [1.0]}),
        (2, {"coefficients": [1.0, 0.5], "scale": 0.7}),
        (3, {"coefficients": [0.2, 1.0, 1.0], "normalize": False}),
    ],
)
def test_equals_the_naive_reference(
    experts: int, parameters: dict[str, Any], density: float, dtype: torch.dtype
) -> None:
    models = make_models(experts, dtype=dtype)
    expected = naive_ties(models.base, models.experts, density=density, **parameters)
    coefficients = parameters["coefficients"]
    others = {key: value for key, value in parameters.items() if key != "coefficients"}
    merged = merge("ties", models, density=density, coefficient=coefficients, **others)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6)
        kept = keep_count(density, tensor.numel())
        assert merged.reports[name] == {"coefficient": coefficients, "kept": [kept] * experts}


def test_exactly_k_entries_are_kept_among_ties() -> None:
    """bfloat16 task vectors tie; the kept ones are the first, so the merged tensor is known element by element."""
    models = make_models(1, dtype=torch.bfloat16, extra={"model.layers.0.big": (40, 50)})
    base, expert = (model["model.layers.0.big"].float() for model in (models.base, models.experts[0]))
    delta = expert - base
    assert len(delta.abs().unique()) < 1500
    merged = merge("ties", models, density=0.3).tensors["model.layers.0.big"]
    assert torch.equal(merged, torch.where(top_k_mask(delta.abs(), 600), base + delta, base))
    assert int((merged != base).sum()) == 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_stays_where_it_is(value: float) -> None:
    merged = torch.tensor(ties(of([1.0, 2.0, value, 3.0], [2.0, -1.0, 0.5, 1.0]), density=0.5))
    assert merged.isfinite().tolist() == [True, True, False, True]
    rest: Tensor = merged[[0, 1, 3]]
    # of the first expert 3 and the odd one are kept, of the second 2 and the first 1
    assert rest.tolist() == [2.0, -1.0, 3.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 1.5}, "method ties, model ft0: density: .*1"),
        ({"density": -0.1}, "method ties, model ft0: density: .*0"),
        ({"densty": 0.5}, "method ties has no parameter 'densty': did you mean 'density'"),
        ({"scale": "big"}, "method ties: scale: .*number.*'big'"),
        ({"normalize": 3}, "method ties: normalize"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("ties", **parameters)
