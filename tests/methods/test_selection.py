"""Selection against a stable sort of all elements, however the stream is cut."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.driver import run_passes
from torch import Tensor

from streammerge.methods import selection as selection_module
from streammerge.methods.api import Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.brackets import Bracket, likely
from streammerge.methods.selection import Selection, k_largest_passes, kept_count, order_statistic_passes, top_k_passes

INF, NAN = float("inf"), float("nan")
Starts = Callable[[int], Sequence[int]]  # number of rows -> the first row of every block


def every(rows: int) -> Starts:
    return lambda total: range(0, total, rows)


def whole(total: int) -> Sequence[int]:
    return [0]


def truth(scores: Tensor, k: int) -> Tensor:
    """The first k of a stable descending sort of the magnitudes (it puts NaN first), as a flat mask."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().abs().argsort(descending=True, stable=True)[:k]] = True
    return mask


def select(
    tensors: Sequence[Sequence[Tensor]], counts: Sequence[int], starts: Starts, sampled: slice = slice(None, None, 3)
) -> tuple[list[Tensor], int]:
    """Select `counts[e]` of expert e's scores from a unit of tensors[t][e] [r, c].

    Args:
        sampled: blocks that make the sample.

    Returns:
        One flat mask over the unit per expert, and how many passes read all of the data.
    """
    contexts = [TensorContext(f"t{i}", tuple(scores[0].shape), "F32", 0) for i, scores in enumerate(tensors)]
    unit = Unit("unit", tuple(contexts))
    reads = 0

    def blocks() -> Iterator[RowBlock]:
        offset = 0
        for context, scores in zip(contexts, tensors, strict=True):
            firsts = [*starts(context.rows), context.rows]
            for first, end in pairwise(firsts):
                stored = [values.view(context.rows, context.columns)[first:end] for values in scores]
                yield RowBlock(context, offset, first, stored, [], torch.float32)
            offset += context.numel

    def counted() -> Iterator[RowBlock]:
        nonlocal reads
        reads += 1
        return blocks()

    passes = top_k_passes(lambda b: b.stored, [k / unit.numel for k in counts])
    results = run_passes(passes, unit, counted, sample=lambda: list(blocks())[sampled])
    selections: list[Selection] = results["selection"]
    assert [selection.kept for selection in selections] == list(counts)
    parts = [
        [s.mask(block.stored[e], block.offset).bool().flatten() for block in blocks()] for e, s in enumerate(selections)
    ]
    return [torch.cat(part) for part in parts], reads


def deltas(dtype: torch.dtype, n: int = 600) -> Tensor:
    """Differences of two models stored in `dtype`; in bfloat16 they tie in masses."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator)
    tuned = base + 0.01 * torch.randn(n, generator=generator)
    return (tuned.to(dtype).float() - base.to(dtype).float()).abs()


def patterns(end: int, shift: int = 0) -> Tensor:
    """Floats whose bit patterns are below end << shift."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(0, end, (600,), generator=generator, dtype=torch.int32) << shift).view(torch.float32)


STREAMS = {
    "random": deltas(torch.float32),
    "ties": deltas(torch.bfloat16),
    "denormal": patterns(1 << 23),
    "denormal bfloat16": patterns(1 << 7, 16),
    "least denormals": patterns(20),
    "same high bits": 1 + torch.arange(600).flip(0) % 50 * 2.0**-23,
    "equal": torch.full((600,), 3.5),
    "zeros": torch.zeros(600),
    "signed zeros": torch.tensor([0.0, -0.0, 1e-45] * 200),
    "not finite": torch.tensor([1.0, NAN, INF, -NAN, -INF, 0.0] * 100),
    "all NaN": torch.tensor([NAN, -NAN] * 300),
}


@pytest.fixture(params=[0, 300, selection_module._MOST_KEPT], ids=lambda room: f"room for {room}")
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """For how many scores, besides the counts of the others: none, some of a stream, or all."""
    monkeypatch.setattr(selection_module, "_MOST_KEPT", request.param)
    return int(request.param)


def test_the_streams_are_what_they_are_called() -> None:
    assert len(STREAMS["ties"].unique()) < 100 < 590 < len(STREAMS["random"].unique())
    for name in ("denormal", "denormal bfloat16", "least denormals"):
        assert 0 < STREAMS[name].max() < torch.finfo(torch.float32).tiny
    assert len(STREAMS["denormal bfloat16"].unique()) > 100 and len(STREAMS["denormal"].unique()) > 590
    assert len((STREAMS["same high bits"].view(torch.int32) >> 16).unique()) == 1


@pytest.mark.parametrize("starts", [whole, every(1), every(7), lambda rows: [0, 1, 2, rows // 2]])
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.usefixtures("room")
def test_equals_a_stable_sort(name: str, starts: Starts) -> None:
    scores = STREAMS[name].view(50, 12)
    for k in (0, 1, 2, 199, 200, 201, 300, 401, 599, 600):
        (mask,), _ = select([[scores]], [k], starts)
        assert torch.equal(mask, truth(scores, k)), k


@pytest.mark.parametrize("sampled", [slice(0, 0), slice(0, 1), slice(-1, None), slice(None)])
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.usefixtures("room")
def test_a_sample_changes_nothing(name: str, sampled: slice) -> None:
    """Not even where it is of other scores: the rows are in rising order, so the first is of the least, the last of
    the largest."""
    scores = STREAMS[name].abs().sort().values.view(50, 12)
    for k in (1, 199, 300, 599):
        (mask,), reads = select([[scores]], [k], every(1), sampled)
        assert torch.equal(mask, truth(scores, k)), k
        assert reads <= 4


def test_a_good_sample_spares_a_pass(room: int) -> None:
    """Of float32 scores, which fill their bins: with 65,536 bins for a narrow bracket each has one pattern. Where
    the ties are is known without another pass if there was room for them."""
    generator = torch.Generator().manual_seed(3)
    scores = 1 + torch.rand(300, 1000, generator=generator)
    descending = scores.flatten().sort(descending=True).values
    some_ties_go = int((descending.diff()[59_000:] == 0).nonzero()[0]) + 59_001
    for k in (60_000, some_ties_go):
        seeks = room < 10_000 and bool(descending[k - 1] == descending[k])
        for sampled, expected in ((slice(0, 0), 2 if room < scores.numel() else 1), (slice(None, None, 3), 1)):
            (mask,), reads = select([[scores]], [k], every(10), sampled)
            assert torch.equal(mask, truth(scores, k))
            assert reads == expected + seeks


def test_a_sample_that_misleads_costs_a_pass_more(room: int) -> None:
    """The sampled rows are a thousand times smaller, or larger, than the others, of which too many to note lie near;
    one less where there is room for them all."""
    for factor in (1e-3, 1e3):
        scores = deltas(torch.float32, 400_000).view(400, 1000)
        scores[:10] *= factor
        (mask,), reads = select([[scores]], [130_000], every(10), slice(0, 1))
        assert torch.equal(mask, truth(scores, 130_000)) and reads == (2 if room >= scores.numel() else 3)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_the_likely_bracket_holds_the_place_and_little_else(share: float) -> None:
    """Half of 3,000 rows of which every second is ten times as large as the others: the rows differ, and so little more
    than the error of the sample is taken."""
    generator = np.random.default_rng(4)
    rows = np.sort(generator.random((3000, 64), dtype=np.float32))
    rows[::2] *= 10
    patterns = rows.view(np.int32)
    k = round(share * patterns.size)
    bracket = likely(k, patterns.size, [patterns[:1500]])
    place = np.sort(patterns.reshape(-1))[::-1][k - 1]
    assert bracket.low <= place <= bracket.high
    assert ((patterns >= bracket.low) & (patterns <= bracket.high)).mean() < 0.15
    assert likely(k, patterns.size, []) == Bracket(k)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
@pytest.mark.usefixtures("room")
def test_massive_ties_of_a_bfloat16_matrix(share: float) -> None:
    """Of two bfloat16 models thousands of entries differ by the same: exactly k are kept, however the rows are cut."""
    scores = deltas(torch.bfloat16, 384 * 1024).view(384, 1024)
    values, counts = scores[scores > 0].unique(return_counts=True)
    most = int(counts.argmax())
    assert counts[most] > 20_000
    k = int(counts[most + 1 :].sum()) + round(share * int(counts[most]))
    expected = truth(scores, k)
    for starts in (whole, every(1), every(50), every(128), lambda rows: [0, 1, rows - 1]):
        (mask,), _ = select([[scores]], [k], starts)
        assert int(mask.sum()) == k and torch.equal(mask, expected)
    kept = scores.flatten()[expected]
    assert int((kept == values[most]).sum()) == round(share * int(counts[most]))


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1e-45, INF, NAN])
def test_one_element(value: float, k: int) -> None:
    assert select([[torch.tensor([[value]])]], [k], whole)[0][0].tolist() == [bool(k)]


def test_every_nan_counts_the_same() -> None:
    """Devices differ in the NaN they make, so its bits must not matter."""
    bits = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000, -1, 0x7FFFFFFF], dtype=torch.int32)
    (mask,), _ = select([[bits.view(torch.float32).view(1, -1)]], [2], whole)
    assert mask.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
@pytest.mark.usefixtures("room")
def test_several_experts_and_tensors(rows: int) -> None:
    """The flat index goes on from one tensor of the unit to the next: ties are kept from the first tensor first."""
    shapes = [(10, 6), (1, 40), (100, 5)]
    experts = [STREAMS["ties"], STREAMS["random"], STREAMS["equal"], STREAMS["not finite"], STREAMS["zeros"]]
    tensors = [
        [part.view(shape) for part in parts]
        for shape, parts in zip(shapes, zip(*(e.split([60, 40, 500]) for e in experts), strict=True), strict=True)
    ]
    counts = [120, 240, 90, 301, 600]
    masks, _ = select(tensors, counts, every(rows))
    for mask, scores, k in zip(masks, experts, counts, strict=True):
        assert torch.equal(mask, truth(scores, k))


def test_float64_and_bfloat16_scores() -> None:
    """Scores are compared as float32: what rounds to the same value ties."""
    wide = torch.tensor([[1.0, 1.0 + 1e-12, 2.0, -3.0]], dtype=torch.float64)
    assert select([[wide]], [3], whole)[0][0].tolist() == [True, False, True, True]
    narrow = STREAMS["ties"].bfloat16().view(1, -1)
    assert torch.equal(select([[narrow]], [250], whole)[0][0], truth(narrow.float(), 250))


# Bit patterns of zeros, the least denormal, 1 and its neighbour, infinity and several NaN; and anything else.
PATTERNS = st.sampled_from([0, 1 << 31, 1, 0x3F800000, 0x3F800001, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF])
BITS = PATTERNS | st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_scores_any_cut(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    experts = data.draw(st.lists(st.lists(BITS, min_size=n, max_size=n), min_size=1, max_size=3))
    counts = [data.draw(st.integers(0, n)) for _ in experts]
    second = data.draw(st.integers(0, n - 1))  # where the unit's second tensor begins; 0: there is one
    cuts = data.draw(st.sets(st.integers(1, n)))
    flat = [torch.tensor([b - ((b >> 31) << 32) for b in e], dtype=torch.int32).view(torch.float32) for e in experts]
    spans = [(0, second), (second, n)] if second else [(0, n)]
    tensors = [[scores[a:b].view(-1, 1) for scores in flat] for a, b in spans]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_module, "_MOST_KEPT", data.draw(st.sampled_from([0, 9, selection_module._MOST_KEPT])))
        masks, _ = select(tensors, counts, lambda rows: [0, *sorted(c for c in cuts if c < rows)])
    for mask, scores, k in zip(masks, flat, counts, strict=True):
        assert mask.tolist() == truth(scores, k).tolist()


@pytest.mark.parametrize(
    ("experts", "counts", "reads"),
    [
        ([[5, 4, 3, 3]], [0], 0),  # nothing is kept, or all: there is nothing to look for
        ([[5, 4, 3, 3]], [4], 0),
        ([[5, 4, 3, 3]], [2], 1),  # no ties at the threshold
        ([[4, 4, 3, 3]], [2], 1),  # all ties are kept
        ([[5, 4, 3, 3]], [3], 1),  # one of the two ties goes
        ([[0, 5, 4, 0]], [3], 2),  # one of the two zeros: nobody kept track of them
        ([[5, 4, 3, 3], [5, 4, 3, 3]], [0, 2], 1),
        ([[5, 4, 3, 3], [5, 4, 3, 3]], [4, 3], 1),
    ],
)
def test_passes_that_are_not_needed_are_skipped(experts: list[list[int]], counts: list[int], reads: int) -> None:
    scores = [torch.tensor([row]).float() for row in experts]
    masks, found = select([scores], counts, whole)
    assert found == reads
    assert [mask.tolist() for mask in masks] == [truth(s, k).tolist() for s, k in zip(scores, counts, strict=True)]


def test_a_long_stream_of_equal_halves() -> None:
    """2^24 + 1000 ties and as many larger scores, made block by block: counts beyond what float32 can count."""
    rows, columns = 1 << 8, (1 << 17) + 8
    half = rows // 2 * columns
    tensor = TensorContext("w", (rows, columns), "F32", 0)
    unit = Unit("w", (tensor,))

    def blocks() -> Iterator[RowBlock]:
        for row in range(0, rows, 8):
            value = 1.0 if row < rows // 2 else 2.0
            yield RowBlock(tensor, 0, row, [torch.tensor(value).expand(8, columns)], [], torch.float32)

    assert half > 1 << 24
    for ones, twos in [(0, half - 1), (0, half), ((1 << 24) + 1, half)]:
        (found,) = run_passes(top_k_passes(lambda b: b.stored, [(ones + twos) / unit.numel]), unit, blocks)["selection"]
        for block in blocks():
            mask = found.mask(block.stored[0], block.offset).flatten()
            kept, start = (ones, 0) if block.row < rows // 2 else (twos, half)
            before = min(max(start + kept - block.offset, 0), len(mask))
            assert int(mask.sum()) == before and bool(mask[:before].all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_does_not_grow_with_the_stream(dtype: torch.dtype) -> None:
    """What the passes keep of a stream eight times as long, in numpy's own account; the sample apart."""
    held = []
    for rows in (512, 4096):
        tensor = TensorContext("w", (rows, 4096), "F32", 0)
        scores = deltas(dtype, tensor.numel).view(rows, 4096)
        results: dict[str, Any] = {}
        most = promised = 0
        for step in top_k_passes(lambda b: b.stored, [0.2, 0.7]):
            tracemalloc.start()
            state = step.start(Unit("w", (tensor,)), results)
            if state is not None:
                for row in range(0, rows if step.reads_rows else 0, 32):
                    step.update(state, RowBlock(tensor, 0, row, [scores[row : row + 32]] * 2, [], torch.float32))
                most = max(most, tracemalloc.get_traced_memory()[0])
                promised = max(promised, step.workspace(Unit("w", (tensor,))))
                results[step.name] = step.finish(state)
            tracemalloc.stop()
        assert [selection.is_final for selection in results["selection"]] == [True, True]
        held.append(most)
        assert 0 < most < promised + (1 << 20)  # and the bins of two experts
    assert held[1] < 1.01 * held[0]


@pytest.mark.parametrize("offset", [2**31 - 5, 2**31, 2**32 - 5, 2**40])
def test_ties_whose_flat_index_takes_more_than_32_bits(offset: int) -> None:
    """The end of a unit of which everything before these ten rows is smaller."""
    tensor = TensorContext("w", (10, 3), "F32", 0)
    scores = torch.ones(10, 3)

    def blocks() -> Iterator[RowBlock]:
        for row in range(0, 10, 2):
            yield RowBlock(tensor, offset, row, [scores[row : row + 2]], None, torch.float32)

    passes = top_k_passes(lambda b: b.stored, [13 / 30])
    (found,) = run_passes(passes, Unit("w", (tensor,)), blocks)["selection"]
    assert found.cutoff == offset + 13
    mask = torch.cat([found.mask(block.stored[0], block.offset).flatten() for block in blocks()])
    assert mask.tolist() == [True] * 13 + [False] * 17


@given(st.integers(1, 10**11), st.floats(0, 1))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_kept_count_of_a_fraction_is_its_numerator(numel: int, part: float) -> None:
    """Counts are passed as fractions, k / n; the product of the two must be k again."""
    k = min(numel, round(part * numel))
    assert kept_count(k / numel, numel) == k


@pytest.mark.parametrize(
    ("density", "numel", "kept"), [(0.5, 5, 2), (0.5, 7, 4), (0.2, 9, 2), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_kept_count_rounds_half_to_even(density: float, numel: int, kept: int) -> None:
    assert kept_count(density, numel) == kept


def blocks_of(scores: Tensor, rows: int) -> tuple[Unit, Callable[[], Iterator[RowBlock]]]:
    context = TensorContext("w", tuple(scores.shape), "F32", None)

    def blocks() -> Iterator[RowBlock]:
        for row in range(0, len(scores), rows):
            yield RowBlock(context, 0, row, [scores[row : row + rows]], None, torch.float32)

    return Unit("w", (context,)), blocks


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("name", STREAMS)
def test_order_statistics_equal_a_sort(name: str, rows: int) -> None:
    scores = STREAMS[name].view(50, 12)
    ranks = [0, 1, 149, 150, 299, 300, 299, 449, 598, 599]
    unit, blocks = blocks_of(scores, rows)
    passes = order_statistic_passes(lambda block: block.stored[0], lambda numel: ranks, "ranks")
    found = torch.tensor(run_passes(passes, unit, blocks)["ranks"])
    expected = scores.flatten().abs().sort().values[ranks]  # it puts NaN last
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_order_statistics_by_hand() -> None:
    """Magnitudes 1, 2, 2, 7; and of a single score."""
    for values, ranks, expected in (([2.0, -7.0, 1.0, -2.0], [0, 1, 2, 3], [1.0, 2.0, 2.0, 7.0]), ([3.5], [0], [3.5])):
        unit, blocks = blocks_of(torch.tensor([values]), 1)
        passes = order_statistic_passes(lambda block: block.stored[0], lambda numel, r=ranks: r, "ranks")
        assert run_passes(passes, unit, blocks)["ranks"] == expected


def test_counts_may_depend_on_what_was_measured() -> None:
    """k comes from an earlier pass: here the number of scores of 2."""

    class Twos(Pass):
        name = "twos"

        def start(self, unit: Unit, done: Results) -> list[int]:
            return [0]

        def update(self, state: list[int], block: RowBlock) -> None:
            state[0] += int((block.stored[0] == 2).sum())

        def finish(self, state: list[int]) -> int:
            return state[0]

    scores = torch.tensor([[2.0, 3.0], [2.0, 1.0], [4.0, 2.0]])
    unit, blocks = blocks_of(scores, 2)
    counted = k_largest_passes(lambda block: block.stored, lambda unit, done: [done["twos"]])
    (found,) = run_passes([Twos(), *counted], unit, blocks)["selection"]
    assert found.kept == 3
    assert found.mask(scores, 0).tolist() == [[True, True], [False, False], [True, False]]


TRIMMED = {
    "zeros and signs": [[0.0, -0.0, 1.0, -1.0], [2.0, -2.0, 1.0, -3.0]],
    "denormal": [[1e-45, -1e-45, 3e-45, 0.0], [-3e-45, 1e-40, 1e-39, -1e-40]],
    "infinite": [[INF, 1.0, -INF, -2.0], [3.0, 0.5, 1.0, -1.0]],
    "not a number": [[NAN, 1.0, -2.0, 1.0], [NAN, -1.0, 0.0, 2.0]],
    "largest": [[3.4028234e38, -3.4028234e38, 1.0, 2.0], [-1.0, 0.0, 1.0, 3.0]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("values", TRIMMED.values(), ids=TRIMMED)
def test_trimmed_is_the_vector_where_it_is_kept(values: list[list[float]], k: int, dtype: torch.dtype) -> None:
    """However the rows are cut: whole, or each with its own share of the ties."""
    vector = torch.tensor(values, dtype=dtype)
    scores = vector.float()
    kept = truth(scores, k).view(vector.shape)
    unit, blocks = blocks_of(scores, 2)
    (found,) = run_passes(k_largest_passes(lambda block: block.stored, lambda *_: [k]), unit, blocks)["selection"]
    for rows in (1, 2):
        for row in range(0, len(vector), rows):
            part = slice(row, row + rows)
            trimmed = found.trimmed(vector[part], row * vector.shape[1])
            expected = torch.where(kept[part], vector[part], vector[part] * 0)
            assert trimmed.dtype == dtype and torch.equal(trimmed.nan_to_num(7), expected.nan_to_num(7))
