"""Arcee Fusion: by hand, and against torch's quantiles of the whole tensor."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, context_of, make_models, merge, resolve
from torch import Tensor

from streammerge.errors import RecipeError
from streammerge.methods import api
from streammerge.methods.api import RowBlock
from streammerge.methods.arcee_fusion import _importance


def fusion(base: Any, expert: Any) -> tuple[Any, dict[str, Any]]:
    models = Models({"w": torch.tensor(base)}, [{"w": torch.tensor(expert)}], {})
    merged = merge("arcee_fusion", models)
    return merged.tensors["w"].tolist(), merged.reports["w"]


def test_by_hand() -> None:
    """Of a base row (0, 0) q is (1/2, 1/2); of (ln 3, 0) p is (3/4, 1/4): K = 3/4 ln 3/2 + 1/4 ln 1/2. Adding 5 to a
    whole row moves no probability: K = 0. Importances x = K ln 3, 0, 0, 0: the quartiles are 0, 0 and x / 4, the
    threshold 1.5 x / 4. So ln 3 is taken and 5 is not."""
    three = torch.tensor(3.0).log().item()
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    models = Models({"w": torch.zeros(2, 2)}, [{"w": torch.tensor([[three, 0.0], [5.0, 5.0]])}], {})
    merged = merge("arcee_fusion", models)
    assert merged.tensors["w"].tolist() == [[three, 0.0], [0.0, 0.0]]
    threshold = pytest.approx(0.375 * three * divergence, rel=1e-6)
    assert merged.reports["w"] == {"coefficient": [1.0], "kept": 1, "threshold": threshold}


@pytest.mark.parametrize(
    ("expert", "kept"),
    [
        ([1.0, -2.0, 3.0, -4.0, 10.0], [4]),  # in units of K: quartiles 2, 3, 4; threshold 6
        ([10.0, 3.0, -2.0, 4.0, 1.0], [0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], []),
        ([1.0, 3.0], []),  # 1.5, 2 and 2.5: 3.5
        ([1.0, 2.0, 9.0], [2]),  # 1.5, 2 and 5.5: 8
        ([1.0, 2.0, 7.0], [2]),  # 1.5, 2 and 4.5: 6.5
        ([1.0, 2.0, 4.0], []),  # 1.5, 2 and 3: 4.25
        ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], []),
    ],
)
def test_thresholds_by_hand(expert: list[float], kept: list[int]) -> None:
    """A vector is one row, so all its importances have the same K: |theta_1 - theta_0| decides."""
    values, report = fusion([0.0] * len(expert), expert)
    assert values == [value if i in kept else 0.0 for i, value in enumerate(expert)]
    assert report["kept"] == len(kept)


def naive_mask(base: Tensor, expert: Tensor) -> tuple[Tensor, float]:
    """In float64, of the importances in float32, with torch's linear quantiles."""
    a, b = (tensor.double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in (expert, base))
    p, q = a.softmax(1) + 1e-8, b.softmax(1) + 1e-8
    divergence = (p * (p / q).log()).sum(1).clamp(min=0)
    importance = (expert.float() - base.float()).abs() * divergence.float().view(*base.shape[:-1], 1).squeeze(
        -1 if base.dim() == 0 else ()
    )
    lower, median, upper = importance.double().flatten().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    threshold = median + 1.5 * (upper - lower)
    return importance.double() >= threshold, threshold


def assert_equals_the_naive_truth(models: Models) -> None:
    merged = merge("arcee_fusion", models)
    for key, base in models.base.items():
        expert = models.experts[0][key]
        mask, threshold = naive_mask(base, expert)
        assert merged.reports[key]["threshold"] == pytest.approx(threshold, rel=1e-6, abs=1e-30), key
        assert merged.reports[key]["kept"] == int(mask.sum()), key
        assert torch.equal(merged.tensors[key], torch.where(mask, expert, base).float()), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_truth(dtype: torch.dtype) -> None:
    shapes = {"stack": (2, 5, 4), "big": (40, 50), "scalar": (), "tall": (30, 1)}
    models = make_models(1, dtype=dtype, extra=shapes)
    assert_equals_the_naive_truth(models)


def test_above_a_million_entries_nothing_is_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1500, 1001, generator=generator)
    expert = base + 0.01 * torch.randn(base.shape, generator=generator)
    assert_equals_the_naive_truth(Models({"w": base}, [{"w": expert}], {}))


def test_most_entries_untouched() -> None:
    """Three quarters of the importances are zero, and so is the threshold: everything is taken."""
    base, expert = torch.zeros(8, 8), torch.zeros(8, 8)
    expert[0] = torch.arange(8.0)
    merged = merge("arcee_fusion", Models({"w": base}, [{"w": expert}], {}))
    assert torch.equal(merged.tensors["w"], expert)
    assert merged.reports["w"] == {"coefficient": [1.0], "kept": 64, "threshold": 0.0}


def test_rows_of_one_entry_are_taken_whole() -> None:
    assert fusion([[1.0], [2.0]], [[3.0], [-4.0]])[0] == [[3.0], [-4.0]]
    assert fusion(1.0, 3.0)[0] == 3.0
    assert fusion([[]], [[]]) == ([[]], {"coefficient": [1.0], "kept": 0, "threshold": None})


def test_what_is_not_finite() -> None:
    """A NaN makes the divergence of its row NaN, and the row the base's; of a quarter of NaN so is the threshold."""
    base = torch.zeros(8, 2)
    expert = torch.tensor([[1.0, 3.0], *[[0.0, 0.0]] * 7])
    assert merge("arcee_fusion", Models({"w": base}, [{"w": expert}], {})).tensors["w"].tolist()[0] == [1.0, 3.0]
    expert[1, 0] = math.nan
    merged = merge("arcee_fusion", Models({"w": base}, [{"w": expert}], {}))
    assert merged.tensors["w"].tolist() == [[1.0, 3.0], *[[0.0, 0.0]] * 7]
    expert[2:, 0] = math.nan
    merged = merge("arcee_fusion", Models({"w": base}, [{"w": expert}], {}))
    assert torch.equal(merged.tensors["w"], base)
    assert merged.reports["w"] == {"coefficient": [1.0], "kept": 0, "threshold": None}


@pytest.mark.parametrize("columns", [2, 3, 17, 640, 4096])
def test_the_importance_of_a_row_does_not_depend_on_the_others(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(24, columns, generator=generator) for _ in range(2)]
    context = context_of("w", pair[0])

    def importance(step: int) -> Tensor:
        cuts = [[model[row : row + step] for model in pair] for row in range(0, 24, step)]
        return torch.cat([_importance(RowBlock(context, 0, 0, cut, None, torch.float32)) for cut in cuts])

    assert all(torch.equal(importance(step), importance(24)) for step in (1, 2, 5))


@pytest.mark.parametrize("elements", [1, 37, 200])
def test_row_blocks_of_any_size_and_their_report(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(1, extra={"big": (40, 50)})
    whole = merge("arcee_fusion", models)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    assert merge("arcee_fusion", models).reports == whole.reports


def test_several_models() -> None:
    with pytest.raises(RecipeError, match="method arcee_fusion takes one fine-tuned model, not 2"):
        resolve("arcee_fusion", experts=2)
