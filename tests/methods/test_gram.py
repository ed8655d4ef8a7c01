"""The Gram matrix: by hand, exact at small angles, and the same however the rows are cut."""

import math

import pytest
import torch
from methods.driver import Models, context_of, make_models, merge, run_passes

from streammerge.errors import CheckpointError
from streammerge.methods import api
from streammerge.methods.api import RowBlock, Unit
from streammerge.methods.gram import Combination, Gram, GramPass, add_scaled, combine, models_of


def measure(*tensors: torch.Tensor, rows: int | None = None) -> Gram:
    """The Gram matrix of tensors, `rows` rows at a time."""
    context = context_of("w", tensors[0])
    unit = Unit("w", (context,))
    found: list[Gram] = []

    def solve(gram: Gram, unit: Unit) -> Combination:
        found.append(gram)
        return Combination((), {})

    def blocks() -> list[RowBlock]:
        step = rows or context.tile_rows
        views = [tensor.view(context.rows, context.columns) for tensor in tensors]
        return [
            RowBlock(context, 0, row, [view[row : row + step] for view in views], [], torch.float32)
            for row in range(0, context.rows, step)
        ]

    run_passes([GramPass(models_of, solve)], unit, blocks)
    return found[0]


def test_by_hand() -> None:
    """(3, 0) and (2, 2): 9, 8 and 1 + 4; 45 degrees apart: the chord of the directions squared is 2 - sqrt 2."""
    gram = measure(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 2.0]))
    assert gram == Gram((9.0, 8.0), ((0.0, 5.0), (5.0, 0.0)))
    assert gram.chord2(0, 1) == pytest.approx(2 - math.sqrt(2), rel=1e-15)
    assert gram.cosine(0, 1) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert gram.widest_angle == pytest.approx(math.pi / 4, rel=1e-15)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 1e-3, 1.0, 3.0, math.pi])
def test_small_angles_keep_their_digits(angle: float) -> None:
    """Of unit vectors; their cosine alone would be 1 up to 1e-8 rad."""
    gram = Gram((1.0, 1.0), ((0.0, 4 * math.sin(angle / 2) ** 2), (4 * math.sin(angle / 2) ** 2, 0.0)))
    assert gram.widest_angle == pytest.approx(angle, rel=1e-7)


def test_degenerate() -> None:
    assert measure(torch.zeros(2), torch.ones(2)).widest_angle is None
    assert measure(torch.tensor(2.0), torch.tensor(-3.0)) == Gram((4.0, 9.0), ((0.0, 25.0), (25.0, 0.0)))
    assert measure(torch.ones(2, 2), 2 * torch.ones(2, 2)).widest_angle == 0
    assert measure(torch.ones(2, 2), -2 * torch.ones(2, 2)).widest_angle == pytest.approx(math.pi)
    assert len(measure(torch.ones(3))) == 1


@pytest.mark.parametrize("shape", [(50, 17), (200, 3), (7, 1000), (64, 64), (900, 1)])
def test_the_same_bits_for_every_cut(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    whole = measure(*tensors, rows=shape[0])
    assert {measure(*tensors, rows=rows) for rows in (1, 2, 3, 5, 8, 13, 64)} == {whole}


def test_equals_float64_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(31, 47, generator=generator) for _ in range(3)]
    gram = measure(*tensors)
    wide = [tensor.double().flatten() for tensor in tensors]
    assert gram.squares == pytest.approx([float(v @ v) for v in wide], rel=1e-14)
    for i in range(3):
        for j in range(3):
            assert gram.distances[i][j] == pytest.approx(float((wide[i] - wide[j]).square().sum()), rel=1e-14)
            if i != j:
                assert gram.cosine(i, j) == pytest.approx(
                    float(torch.cosine_similarity(wide[i], wide[j], 0)), abs=1e-14
                )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["karcher", "slerp", "nuslerp", "multislerp", "model_stock"])
def test_what_is_not_finite_has_no_angle(method: str, value: float) -> None:
    base, expert = torch.tensor([1.0, 2.0]), torch.tensor([value, 1.0])
    models = Models({"w": base}, [{"w": expert}] * (2 if method == "model_stock" else 1), {})
    with pytest.raises(CheckpointError, match="tensor 'w'.*not finite"):
        merge(method, models)


def test_combinations_of_equal_vectors_are_the_vector() -> None:
    vector = make_models(0, blocks=1, dtype=torch.float32).base["lm_head.weight"]
    assert torch.equal(combine([vector] * 3, [0.1, 0.2, 0.7]), vector)
    rows = torch.rand(5, 1, dtype=torch.float64)
    assert torch.equal(combine([vector, vector], [rows, 1 - rows]), vector)
    assert torch.equal(add_scaled(vector, [torch.zeros_like(vector)], [0.3]), vector)


def test_combination_by_hand() -> None:
    vectors = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]])]
    assert combine(vectors, [2.0, -0.5]).tolist() == [[0.5, 6.0]]
    assert combine(vectors, [torch.tensor([[2.0]]).double(), torch.tensor([[-0.5]]).double()]).dtype == torch.float32
    assert add_scaled(vectors[0], vectors, [2.0, -0.5]).tolist() == [[1.5, 8.0]]


def test_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured coefficients do not depend on the tiles, to the bit."""
    models = make_models(3)
    whole = merge("karcher", models).reports
    for elements in (1, 12, 37):
        monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
        assert merge("karcher", models).reports == whole
