"""nuslerp: whole tensors, rows and columns; models and task vectors; by hand and against float64 in memory."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.test_slerp import naive_slerp
from torch import Tensor

from streammerge.errors import CheckpointError, RecipeError

ROWS: dict[str, Any] = {"nuslerp_flatten": False}
COLUMNS: dict[str, Any] = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
ROOT = math.sqrt(0.5)


def of(*tensors: Any) -> Models:
    """The first is the base."""
    values = [{"w": torch.as_tensor(tensor)} for tensor in tensors]
    return Models(values[0], values[1:], {})


def naive_nuslerp(first: Tensor, second: Tensor, t: float, way: dict[str, Any]) -> Tensor:
    if way and first.dim() > 1:
        a, b = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (first, second))
        if way == COLUMNS:
            a, b = a.T, b.T
        merged = torch.stack([naive_slerp(p, q, t) for p, q in zip(a, b, strict=True)])
        return (merged.T if way == COLUMNS else merged).reshape(first.shape)
    return naive_slerp(first, second, t)


def test_by_hand() -> None:
    """Weights 1 and 2: t = 2/3 of a right angle; sin 30 and sin 60."""
    merged = merge("nuslerp", of([2.0, 0.0], [0.0, 2.0]), coefficient=2)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([1.0, 2 * math.sqrt(0.75)]))
    report = merged.reports["w"]
    assert report["base_coefficient"] == pytest.approx(0.5)
    assert report["coefficient"] == pytest.approx([math.sqrt(0.75)])


def test_two_models_by_hand() -> None:
    """Task vectors (2, 0) and (0, 2) half way: (sqrt 2, sqrt 2); without the base (3, 1) and (1, 3) are 53 degrees
    apart: sin 26.57 / sin 53.13 = 0.559 of each."""
    models = of([1.0, 1.0], [3.0, 1.0], [1.0, 3.0])
    merged = merge("nuslerp", models)
    torch.testing.assert_close(merged.tensors["w"], torch.tensor([1 + 2 * ROOT, 1 + 2 * ROOT]))
    assert merged.reports["w"]["coefficient"] == pytest.approx([ROOT, ROOT])
    assert "base_coefficient" not in merged.reports["w"]
    plain = merge("nuslerp", models, task_vectors=False).tensors["w"]
    torch.testing.assert_close(plain, torch.full((2,), 4 / (2 * math.cos(math.atan(0.5)))))


def test_rows_and_columns_by_hand() -> None:
    """Rows: a right angle, and collinear. Columns: (1, 1), (0, 3) at 45 degrees; (0, 0), (2, 0) linear."""
    models = of([[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]])
    rows = merge("nuslerp", models, **ROWS)
    torch.testing.assert_close(rows.tensors["w"], torch.tensor([[ROOT, 2 * ROOT], [2.0, 0.0]]))
    assert rows.reports["w"] == {"coefficient": [None]}
    half = 1 / (2 * math.cos(math.pi / 8))
    columns = merge("nuslerp", models, **COLUMNS).tensors["w"]
    torch.testing.assert_close(columns, torch.tensor([[half, 1.0], [4 * half, 0.0]]))


@pytest.mark.parametrize("way", [{}, ROWS, COLUMNS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_reference(way: dict[str, Any], dtype: torch.dtype) -> None:
    one, two = (make_models(n, dtype=dtype, extra={"model.layers.0.stack": (2, 5, 4)}) for n in (1, 2))
    cases = [
        (one, {"base_coefficient": 1.0, "coefficient": 3.0}),
        (two, {"coefficient": [1.0, 3.0]}),
        (two, {"coefficient": [1.0, 3.0], "task_vectors": False}),
    ]
    for number, (models, parameters) in enumerate(cases):
        merged = merge("nuslerp", models, **parameters, **way)
        for name, tensor in merged.tensors.items():
            base, *experts = (model[name].float() for model in (models.base, *models.experts))
            if number == 0:
                expected = naive_nuslerp(base, experts[0], 0.75, way)
            elif number == 1:
                expected = base + naive_nuslerp(experts[0] - base, experts[1] - base, 0.75, way)
            else:
                expected = naive_nuslerp(*experts, 0.75, way)
            torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("way", [{}, ROWS, COLUMNS])
@pytest.mark.parametrize("tiles", [1, 8])
def test_tiles(way: dict[str, Any], tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2)
    whole = merge("nuslerp", models, **way).tensors
    monkeypatch.setattr("streammerge.methods.api.TILE_ELEMENTS", tiles)
    again = merge("nuslerp", models, **way).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("way", [{}, ROWS, COLUMNS])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [[4.0, 8.0], [4.0, 8.0]], [[3.0, 6.0], [3.0, 6.0]]),
        ([[4.0, 8.0], [4.0, 8.0]], [[-4.0, -8.0], [-4.0, -8.0]], [[-2.0, -4.0], [-2.0, -4.0]]),  # antipodal: linear
        ([[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]]),
        ([4.0, 8.0], [8.0, 16.0], [7.0, 14.0]),
        ([[4.0]], [[-4.0]], [[-2.0]]),
        (4.0, -4.0, -2.0),
        ([], [], []),
        ([[], []], [[], []], [[], []]),
    ],
)
def test_degenerate(way: dict[str, Any], first: Any, second: Any, expected: Any) -> None:
    merged = merge("nuslerp", of(first, second), coefficient=3, **way).tensors["w"]
    torch.testing.assert_close(merged, torch.tensor(expected))
    around = merge("nuslerp", of(torch.zeros_like(merged), first, second), coefficient=[1, 3], **way).tensors["w"]
    torch.testing.assert_close(around, torch.tensor(expected))


def test_one_odd_row_says_so() -> None:
    with pytest.raises(CheckpointError, match="tensor 'w'.*not finite"):
        merge("nuslerp", of([[1.0, 2.0]], [[math.nan, 1.0]]))
    merged = merge("nuslerp", of([[1.0, 2.0], [1.0, 0.0]], [[math.nan, 1.0], [0.0, 1.0]]), **ROWS).tensors["w"]
    assert merged.isfinite().all(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("experts", "parameters", "message"),
    [
        (3, {}, "method nuslerp merges one or two fine-tuned models, not 3"),
        (1, {"coefficient": -1}, "method nuslerp: the coefficients sum to 0"),
        (2, {"coefficient": [1, -1]}, "method nuslerp: the coefficients sum to 0"),
        (1, {"nuslerp_flatten": "maybe"}, "method nuslerp: nuslerp_flatten"),
    ],
)
def test_bad_parameters(experts: int, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("nuslerp", experts=experts, **parameters)
