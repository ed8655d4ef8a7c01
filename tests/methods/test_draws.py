"""The draws: SplitMix64 as published, uniform, independent, and the same however they are cut."""

import math

import pytest
import torch
from methods.sparse_truth import naive_draws, splitmix64
from torch import Tensor

from streammerge.methods.draws import stream_key, uniform, words

N = 1 << 20
KEY = stream_key(42, "model.layers.0.mlp.up_proj.weight", 0)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - 0.5, b.double() - 0.5
    return ((a * b).mean() * 12).item()


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    assert abs(correlation(a, b)) < 5 / math.sqrt(len(a))


def test_the_published_outputs() -> None:
    """The first outputs of splitmix64.c for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word % 2**64 for word in words(1234567, 0, 4).tolist()] == expected


@pytest.mark.parametrize("key", [0, 1, -1, KEY, 2**63 - 1, -(2**63)])
def test_equals_the_sequential_generator(key: int) -> None:
    generator = splitmix64(key)
    expected = [next(generator) for _ in range(300)]
    assert [word % 2**64 for word in words(key, 0, 300).tolist()] == expected
    assert [word % 2**64 for word in words(key, 123, 50).tolist()] == expected[123:173]


def test_equals_the_naive_draws() -> None:
    found = uniform(stream_key(7, "w", 2), 0, (5, 3))
    assert torch.equal(found, naive_draws(7, "w", 2, (5, 3)))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("first", [0, 1, 2, 7, 10])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_any_part_of_a_stream(first: int, count: int) -> None:
    assert torch.equal(uniform(KEY, first, (count,)), uniform(KEY, 0, (20,))[first : first + count])


def test_shapes() -> None:
    assert torch.equal(uniform(KEY, 3, (4, 5)).flatten(), uniform(KEY, 3, (20,)))
    assert uniform(KEY, 3, (0, 5)).shape == (0, 5)
    assert uniform(KEY, 3, ()).shape == ()


def test_elements_far_out() -> None:
    """Beyond 2^32, and where the counter no longer fits a float."""
    for first in (2**32 - 3, 2**40 + 1, 2**55 + 1):
        part = uniform(KEY, first, (6,))
        assert torch.equal(uniform(KEY, first + 3, (3,)), part[3:])
        assert len(set(part.tolist())) == 6


def test_range_mean_and_variance() -> None:
    draws = uniform(KEY, 0, (N,)).double()
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    assert torch.equal(draws * 2**24, (draws * 2**24).round())
    assert draws.mean().item() == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / N))
    assert draws.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / N))


@pytest.mark.parametrize("shift", [0, 8, 16])
@pytest.mark.parametrize("start", [0, 1])
def test_chi_square(shift: int, start: int) -> None:
    """256 bins by the high, middle and low 8 bits, for the even and the odd draws: 255 +- 22.6."""
    draws = uniform(KEY, 0, (N,))[start::2]
    counts = ((draws * 2**24).long() >> shift).bitwise_and_(255).bincount(minlength=256).double()
    expected = N / 2 / 256
    assert ((counts - expected).square().sum() / expected).item() == pytest.approx(255, abs=5 * math.sqrt(2 * 255))


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 4096])
def test_neighbours_are_uncorrelated(distance: int) -> None:
    draws = uniform(KEY, 0, (N,))
    assert_uncorrelated(draws[distance:], draws[:-distance])


def test_streams_are_uncorrelated() -> None:
    keys = [stream_key(s, t, m) for s, t, m in [(42, "a", 0), (42, "a", 1), (42, "b", 0), (43, "a", 0), (0, "a", 0)]]
    assert len(set(keys)) == len(keys)
    streams = [uniform(key, 0, (1 << 18,)) for key in keys]
    for i, stream in enumerate(streams):
        for other in streams[:i]:
            assert_uncorrelated(stream, other)
            assert_uncorrelated(stream[1:], other[:-1])


def test_keys_do_not_run_together() -> None:
    assert stream_key(1, "2\nw", 3) != stream_key(1, "w", 3) != stream_key(11, "w", 3)
    assert stream_key(1, "w", 12) != stream_key(11, "w", 2)
