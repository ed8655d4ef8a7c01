"""A hundred thousand headers, ten thousand of everything else: our errors only, little memory, little time."""

import sys

import pytest
from fuzz.bulk import COUNTS, bulk

MOST_MEMORY = 64 << 20
MOST_SECONDS = 0.050  # of one input, in CPU time of this process
IN_MEMORY = ("header", "index", "recipe", "journal")  # the others go through files, whose time is the disk's


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize("name", COUNTS)
def test_bulk(name: str) -> None:
    found = bulk(name, COUNTS[name], seed=1)
    assert found.inputs == COUNTS[name]
    assert 0 < found.refused < found.inputs
    assert found.memory < MOST_MEMORY
    assert found.slowest < MOST_SECONDS or name not in IN_MEMORY


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize("name", COUNTS)
def test_some(name: str) -> None:
    assert bulk(name, 1000, seed=2).memory < MOST_MEMORY
