"""The cutting of memory, by closed forms."""

import pytest

from streammerge.budget import Budget, aligned, make_budget, run_bytes, unit_bytes
from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import MemoryBudgetError
from streammerge.methods.api import TILE_ELEMENTS, TensorContext, Unit

MIB = 2**20


def tensor(name: str, *shape: int) -> tuple[TensorContext, list[TensorInfo]]:
    """A bfloat16 tensor in a base and one expert."""
    context = TensorContext(name, shape, "BF16", 0)
    return context, [TensorInfo(name, "BF16", shape, "f", 0, 2 * context.numel)] * 2


def budget(max_ram: int, *tensors: tuple[TensorContext, list[TensorInfo]], threads: int | None = 2) -> Budget:
    units = [Unit(context.name, (context,)) for context, _ in tensors]
    return make_budget(max_ram, threads, units, {context.name: infos for context, infos in tensors})


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_views_start_at_multiples_of_64_bytes(count: int, expected: int) -> None:
    assert aligned(count) == expected


def test_a_run_holds_its_rows_in_every_input() -> None:
    context, infos = tensor("w", 10, 33)
    assert run_bytes(context, infos, 3) == 2 * aligned(3 * 33 * 2)
    assert unit_bytes(Unit("w", (context,)), {"w": infos}) == 2 * aligned(660)


def test_the_budget_is_never_exceeded_and_used_where_it_helps() -> None:
    large = tensor("w", 20_000, 4096)
    for max_ram in (64 * MIB, 256 * MIB, 1000 * MIB):
        cut = budget(max_ram, large, tensor("v", 64))
        assert cut.workers == 2
        assert max_ram - 2 < cut.total <= max_ram or cut.buffer_bytes == unit_bytes(
            Unit("w", (large[0],)), {"w": large[1]}
        )


def test_no_more_is_taken_than_the_largest_unit_needs() -> None:
    context, infos = tensor("w", 100, 100)
    assert budget(1000 * MIB, (context, infos), tensor("v", 5)).buffer_bytes == 2 * aligned(20_000)


def test_of_what_is_cheap_to_read_again_no_more_is_kept_than_asked_for() -> None:
    context, infos = tensor("w", 20_000, 4096)
    unit, inputs = Unit("w", (context,)), {"w": infos}
    tile = run_bytes(context, infos, context.tile_rows)
    for most in (tile - 1, tile, 10 * MIB, 256 * MIB, unit_bytes(unit, inputs) + 1):
        cut = make_budget(1000 * MIB, 1, [unit], inputs, most=most)
        assert cut.buffer_bytes == min(max(most, tile), unit_bytes(unit, inputs))
    assert make_budget(1000 * MIB, 1, [unit], inputs).buffer_bytes == unit_bytes(unit, inputs)


def test_workers_are_given_up_before_the_merge_is() -> None:
    large = tensor("w", 20_000, 4096)
    least = budget(64 * MIB, large, tensor("v", 64)).scratch_bytes + run_bytes(*large, large[0].tile_rows)
    assert budget(2 * least, large, tensor("v", 64)).workers == 2
    assert budget(2 * least - 1, large, tensor("v", 64)).workers == 1
    assert budget(least, large, tensor("v", 64)).workers == 1
    with pytest.raises(MemoryBudgetError, match=rf"one piece of tensor 'w'.*at least {-(-least // MIB)}MiB"):
        budget(least - 1, large, tensor("v", 64))


def test_there_are_no_more_workers_than_units_or_threads() -> None:
    one = tensor("w", 100, 100)
    assert budget(256 * MIB, one, threads=8).workers == 1
    assert budget(256 * MIB, one, tensor("v", 5), tensor("u", 5), threads=1).workers == 1


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 4), (4, 0), (5, TILE_ELEMENTS + 1)])
def test_a_tile_is_whole_rows_of_about_the_tile_size(shape: tuple[int, ...]) -> None:
    context = TensorContext("w", shape, "BF16", None)
    assert context.rows * context.columns == context.numel
    assert 1 <= context.tile_rows <= max(context.rows, 1)
    assert context.tile_rows == 1 or context.tile_rows * context.columns <= TILE_ELEMENTS
