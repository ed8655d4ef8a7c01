"""Phases: their names, their seconds, and the memory that was there in them."""

import subprocess
import sys
from pathlib import Path

import pytest

from streammerge import timeline as timeline_module
from streammerge.host import Resident, resident_memory
from streammerge.timeline import Timeline

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_what_the_system_says_of_memory(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    sizes = "VmHWM:\t    30 kB\nVmRSS:\t    20 kB\nRssAnon:\t     9 kB\n"
    (tmp_path / "proc/self/status").write_text(f"Name:\tpython kB\n{sizes}Threads:\t3\n")
    assert resident_memory(tmp_path) == Resident(20 << 10, 30 << 10, 9 << 10)
    assert resident_memory(tmp_path / "elsewhere") is None


HOLDS = """
import mmap, time
from streammerge import timeline as module

def held(count, seconds):
    with mmap.mmap(-1, count << 20) as memory:
        for start in range(0, len(memory), 4096):
            memory[start] = 1
        time.sleep(seconds)

module._SECONDS = 0.01
timeline = module.Timeline()
with timeline.phase("first"):
    held(96, 0)
with timeline.phase("second"):
    held(64, 0.5)
with timeline.phase("third"):
    pass
for phase in timeline.phases:
    print(phase.name, phase.seconds, phase.peak_bytes)
"""


@linux
def test_the_peak_of_a_phase_is_what_it_held() -> None:
    """The first has the process's highest so far, which the system keeps; the second less, which is looked at.

    In a process of its own: in that of the other tests memory that they let go of is used again.
    """
    told = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True).stdout.split()
    assert told[0::3] == ["first", "second", "third"]
    seconds = [float(text) for text in told[1::3]]
    peaks = [int(text) / MIB for text in told[2::3]]
    assert peaks[0] - peaks[2] == pytest.approx(96, abs=8)
    assert peaks[1] - peaks[2] == pytest.approx(64, abs=8)
    assert seconds[1] >= 0.5 > seconds[2] and seconds[0] > 0


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
