"""RAM: by hand, and against all entries in memory in float64."""

from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.sparse_truth import of
from torch import Tensor

from streammerge.errors import RecipeError

TWO = of([1.0, -2.0, 0.0, 4.0], [3.0, 0.0, 0.0, -2.0])
# Changed by (0, 1), (1, 2), (1), nobody, (0), (0).
THREE = of([4.0, 0.0, 0.0, 0.0, 5.0, -6.0], [2.0, 2.0, 3.0, 0.0, 0.0, 0.0], [0.0, -4.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("name", "models", "parameters", "expected"),
    [
        # (1 + 3) / 2; the first's alone; nobody; (4 - 2) / 2
        ("ram", TWO, {}, [2.0, -2.0, 0.0, 1.0]),
        ("ram", of([1.0, -2.0, 0.0, 4.0], [3.0, 0.0, 0.0, -2.0], base=1.0), {}, [3.0, -1.0, 1.0, 2.0]),
        # what is not above 1 counts as no change: 3 is the second's alone
        ("ram", TWO, {"epsilon": 1}, [3.0, -2.0, 0.0, 1.0]),
        ("ram", TWO, {"epsilon": 4}, [0.0, 0.0, 0.0, 0.0]),
        ("ram", THREE, {}, [3.0, -1.0, 3.0, 0.0, 5.0, -6.0]),
        ("ram", of([2.0, 1e-6]), {}, [2.0, 0.0]),
        # the first shares 2 and has 1 alone: rho = 2, cut to 0.2: times 1.02
        ("ramplus_tl", TWO, {}, [2.0, -2.04, 0.0, 1.0]),
        ("ramplus_tl", TWO, {"r": 1, "alpha": 10}, [2.0, -6.0, 0.0, 1.0]),
        ("ramplus_tl", TWO, {"r": 0}, [2.0, -2.0, 0.0, 1.0]),
        ("ramplus_tl", TWO, {"alpha": 0}, [2.0, -2.0, 0.0, 1.0]),
        # rho: 1 of 2, 2 of 1 (cut to 1), 1 of none: factors 1.5, 2, 2
        ("ramplus_tl", THREE, {"r": 1, "alpha": 1}, [3.0, -1.0, 6.0, 0.0, 7.5, -9.0]),
    ],
)
def test_by_hand(name: str, models: Models, parameters: dict[str, Any], expected: list[float]) -> None:
    assert merge(name, models, **parameters).tensors["w"].tolist() == pytest.approx(expected, rel=1e-6)


def test_reports() -> None:
    assert merge("ram", TWO).reports["w"] == {"coefficient": [1.0, 1.0]}
    found = merge("ramplus_tl", THREE, r=1, alpha=1).reports["w"]
    assert found == {"coefficient": [1.5, 2.0, 2.0], "shared": [1, 2, 1], "unique": [2, 1, 0]}
    unchanged = merge("ramplus_tl", of([0.0, 0.0], [1.0, 0.0])).reports["w"]
    assert unchanged == {"coefficient": [1.0, 1.0], "shared": [0, 0], "unique": [0, 1]}


def naive_ram(base: Tensor, experts: list[Tensor], epsilon: float, r: float, alpha: float) -> Tensor:
    """In float64, all models stacked; r = 0 is plain RAM."""
    vectors = torch.stack([(expert.float() - base.float()).double() for expert in experts])
    active = vectors.abs() > epsilon
    counts = active.sum(0)
    delta = torch.zeros_like(vectors[0])
    for vector, mask in zip(vectors, active, strict=True):
        shared, unique = mask & (counts > 1), mask & (counts == 1)
        rho = int(shared.sum()) / max(int(unique.sum()), 1e-5)
        delta += vector * unique * (1 + r * min(max(rho, 0), alpha)) + vector * shared / counts.clamp(min=1)
    return (base.double() + delta).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [1e-5, 0.2])
@pytest.mark.parametrize(
    ("name", "r", "alpha"), [("ram", 0.0, 0.0), ("ramplus_tl", 0.1, 0.2), ("ramplus_tl", 2.0, 5.0)]
)
def test_equals_the_naive_truth(
    name: str, r: float, alpha: float, epsilon: float, experts: int, dtype: torch.dtype
) -> None:
    """Task vectors that are mostly zero, as reinforcement learning leaves them."""
    models = make_models(experts, dtype=dtype, extra={"model.layers.0.stack": (2, 5, 4), "scalar": ()})
    generator = torch.Generator().manual_seed(1)
    for expert in models.experts:
        for key, tensor in expert.items():
            kept = torch.rand(tensor.shape, generator=generator) < 0.4
            expert[key] = torch.where(kept, tensor, models.base[key])
    more = {"r": r, "alpha": alpha} if name == "ramplus_tl" else {}
    found = merge(name, models, epsilon=epsilon, **more)
    for key, base in models.base.items():
        expected = naive_ram(base, [expert[key] for expert in models.experts], epsilon, r, alpha)
        torch.testing.assert_close(found.tensors[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_what_nobody_changed_keeps_its_bits(name: str) -> None:
    base = {"w": torch.tensor([-0.0, -0.0, 1.0])}
    found = merge(name, Models(base, [{"w": torch.tensor([0.0, 1.0, float("nan")])}], {})).tensors["w"]
    assert found.view(torch.int32).tolist() == torch.tensor([-0.0, 1.0, 1.0]).view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ram", {"epsilon": -1}, "method ram: epsilon: .*0"),
        ("ram", {"r": 0.1}, "method ram has no parameter 'r'"),
        ("ram", {"coefficient": 1}, "method ram has no parameter 'coefficient'"),
        ("ramplus_tl", {"r": -1}, "method ramplus_tl: r: .*0"),
        ("ramplus_tl", {"alpha": -1}, "method ramplus_tl: alpha: .*0"),
    ],
)
def test_bad_parameters(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(name, **parameters)
