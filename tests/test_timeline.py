"""Phases: their names, their seconds, and the memory that was there in them."""

import sys
import time
from pathlib import Path

import pytest

from streammerge import timeline as timeline_module
from streammerge.host import Resident, resident_memory
from streammerge.timeline import Timeline

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_what_the_system_says_of_memory(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython kB\nVmHWM:\t    30 kB\nVmRSS:\t    20 kB\nThreads:\t3\n")
    assert resident_memory(tmp_path) == Resident(20 << 10, 30 << 10)
    assert resident_memory(tmp_path / "elsewhere") is None


@linux
def test_the_peak_of_a_phase_is_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has the process's highest so far, which the system keeps; the second less, which is looked at."""
    monkeypatch.setattr(timeline_module, "_SECONDS", 0.01)
    timeline = Timeline()
    with timeline.phase("first"):
        held = bytearray(96 * MIB)
        held[::4096] = b"x" * len(held[::4096])
        most = len(held)
        del held
    before = resident_memory()
    assert before is not None
    with timeline.phase("second"):
        held = bytearray(64 * MIB)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.5)
        del held
    with timeline.phase("third"):
        pass
    first, second, third = timeline.phases
    assert [phase.name for phase in timeline.phases] == ["first", "second", "third"]
    peaks = [phase.peak_bytes for phase in timeline.phases]
    assert peaks[0] is not None and peaks[1] is not None and peaks[2] is not None
    assert peaks[0] >= before.now + most - 8 * MIB
    assert before.now + 56 * MIB <= peaks[1] < peaks[0]
    assert peaks[2] < peaks[1]
    assert second.seconds >= 0.5 > third.seconds and first.seconds > 0


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "resident_memory", lambda: None)
    timeline = Timeline()
    with timeline.phase("only"):
        pass
    assert timeline.phases[0].peak_bytes is None


def test_a_phase_that_fails_is_none() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="no"), timeline.phase("only"):
        raise ValueError("no")
    assert timeline.phases == []
