"""Progress bars, on a terminal only, and lines; all on standard error."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm

from streammerge.text import visible


def progress_bar(total: int, label: str, unit: str, show: bool) -> tqdm[NoReturn]:
    """A bar with rate and time left; invisible unless `show` and standard error is a terminal."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=None if show else True)


def say(what: str) -> None:
    """One line on what is done next."""
    print(visible(what), file=sys.stderr)


def tell(note: str) -> None:
    """One line that the user should see before the work goes on."""
    print(f"note: {visible(note)}", file=sys.stderr)
