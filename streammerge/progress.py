"""Progress bars: on standard error, on a terminal only."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm


def progress_bar(total: int, label: str, unit: str, show: bool) -> tqdm[NoReturn]:
    """A bar with rate and time left; invisible unless `show` and standard error is a terminal."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=None if show else True)
