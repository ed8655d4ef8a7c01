"""Workers: every item once, the first error stops the rest, memory of one thread is its own."""

from __future__ import annotations

import threading
from itertools import count

import pytest
import torch

from streammerge.workers import Workers, single_threaded_torch


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_item_once(number: int) -> None:
    done: list[int] = []
    with Workers(number) as workers:
        workers.run(done.append, range(100))
        workers.run(done.append, ())
        workers.run(done.append, range(100, 120))
    assert sorted(done) == list(range(120))
    assert number > 1 or done == list(range(120))


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_stops_the_rest(number: int) -> None:
    begun = count()

    def fail(item: int) -> None:
        next(begun)
        if item == 3:
            raise ValueError("three")
        threading.Event().wait(0.001)

    with Workers(number) as workers:
        with pytest.raises(ValueError, match="three"):
            workers.run(fail, range(1000))
        after: list[int] = []
        workers.run(after.append, [1])
    assert next(begun) < 500 and after == [1]


def test_one_works_in_the_calling_thread_and_several_do_not() -> None:
    for number, own in ((1, True), (2, False)):
        seen: set[int] = set()
        with Workers(number) as workers:
            workers.run(lambda item, seen=seen: seen.add(threading.get_ident()), range(20))
        assert (threading.get_ident() in seen) is own


def test_scratch_is_kept_for_one_use_of_one_thread() -> None:
    like = torch.empty(0)
    with Workers(2) as workers:
        first = workers.scratch("a", like, 4, 6)
        assert first.shape == (4, 6) and first.dtype == like.dtype
        assert workers.scratch("a", like, 3, 2).data_ptr() == first.data_ptr(), "smaller: the same memory"
        assert workers.scratch("b", like, 4, 6).data_ptr() != first.data_ptr()
        assert workers.scratch("a", like.double(), 4, 6).dtype == torch.float64
        both = threading.Barrier(2, timeout=10)
        found: list[int] = []

        def take(item: int) -> None:
            both.wait()  # so that each thread has one
            found.append(workers.scratch("a", like, 4, 6).data_ptr())

        workers.run(take, range(2))
    assert len({*found, first.data_ptr()}) == 3


def test_torch_has_its_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), single_threaded_torch():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
