"""The report, drawn in a process of its own: the merging one stays within its memory, and outlives what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from streammerge.checkpoints.checkpoint import REPORT_FILE
from streammerge.figures import GET_IT, can_draw
from streammerge.host import memory_limits, resident_memory
from streammerge.progress import tell
from streammerge.timeline import Phase
from streammerge.units import format_memory

_NEEDED = 192 << 20  # bytes; matplotlib takes 100 MiB, a page of a large model as much again
_SECONDS = 300  # the first time, matplotlib looks at every font there is
_ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
# Not as a module: that would look for what it imports in the current folder first.
_CODE = """
import json, sys
job = json.load(sys.stdin)
sys.path[:] = job["path"]
from streammerge.report.page import report_page
from streammerge.timeline import Phase
phases = [Phase(**phase) for phase in job["phases"]]
sys.stdout.buffer.write(report_page(job["result"], phases, complete_before=job["complete_before"]))
"""


def draw_report(result: Mapping[str, Any], phases: Sequence[Phase], complete_before: int) -> dict[str, bytes]:
    """`report.html` and its content; nothing, and a note, where it cannot be drawn: that costs nobody a merge.

    The arguments are those of `report_page`.
    """
    reason = _hindrance()
    if reason is None:
        job = {"path": sys.path, "result": result, "phases": [*map(asdict, phases)], "complete_before": complete_before}
        page, reason = _run(json.dumps(job).encode())
        if reason is None:
            return {REPORT_FILE: page}
    tell(f"no {REPORT_FILE}, {reason}")
    return {}


def _hindrance() -> str | None:
    if not can_draw():
        return f"which takes matplotlib: {GET_IT}"
    taken = resident_memory()
    limits = [limit for name, limit in memory_limits().items() if not name.startswith("ulimit")]  # those are for each
    left = min(limits, default=_NEEDED) - (taken.now if taken else 0)
    if limits and left < _NEEDED:
        return f"which takes {format_memory(_NEEDED)} of memory, and {format_memory(max(left, 0))} are left"
    return None


def _run(job: bytes) -> tuple[bytes, str | None]:
    """The page, and why there is none."""
    try:
        command = [sys.executable, "-P", "-c", _CODE]
        ended = subprocess.run(
            command, input=job, capture_output=True, timeout=_SECONDS, env={**os.environ, **_ALONE}, check=False
        )
    except subprocess.TimeoutExpired:
        return b"", f"which was not drawn within {_SECONDS} seconds"
    except OSError as error:
        return b"", f"which could not be drawn: {error}"
    if ended.returncode == 0:
        return ended.stdout, None
    told = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return b"", f"which could not be drawn: {told[0] if told else f'exit status {ended.returncode}'}"
