"""NearSwap: by hand, and against the formula as an interpolation."""

import pytest
import torch
from methods.driver import make_models, merge, resolve
from methods.sparse_truth import of

from streammerge.errors import RecipeError


def test_by_hand() -> None:
    """Differences up to t are taken over whole, larger ones give t."""
    models = of([0.25, -0.25, 2.0, -8.0, 0.0], base=1.0)
    assert merge("nearswap", models, t=0.5).tensors["w"].tolist() == [1.25, 0.75, 1.5, 0.5, 1.0]
    assert merge("nearswap", models, t=0.5, coefficient=0.5).tensors["w"].tolist() == [1.125, 0.875, 1.25, 0.75, 1.0]
    assert merge("nearswap", models, t=0).tensors["w"].tolist() == [1.0] * 5
    two = of([0.25, -3.0], [2.0, 3.0])
    assert merge("nearswap", two, t=0.5, coefficient=[1, 0.5]).tensors["w"].tolist() == [0.5, -0.25]


@pytest.mark.parametrize("t", [1e-4, 0.05, 10.0])
def test_equals_the_interpolation(t: float) -> None:
    models = make_models(1, dtype=torch.float32)
    found = merge("nearswap", models, t=t)
    for key, base in models.base.items():
        tuned = models.experts[0][key]
        weight = (t / (base - tuned).abs().clamp(min=1e-6)).clamp(0, 1)
        torch.testing.assert_close(found.tensors[key], weight * tuned + (1 - weight) * base, rtol=1e-6, atol=1e-6)
        assert found.reports[key] == {"coefficient": [1.0]}


def test_bad_parameters() -> None:
    with pytest.raises(RecipeError, match="method nearswap: t: .*0"):
        resolve("nearswap", t=-1)
