"""Progress bars, on a terminal only, and lines; all on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
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


_quiet: dict[str, tuple[int, int]] = {}  # logger -> how many want it quiet, and its level before the first
_lock = Lock()


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Keep a library's warnings off the terminal for as long as any thread is in here.

    Not where its user asked to see even more than warnings.
    """
    logger = logging.getLogger(name)
    with _lock:
        count, level = _quiet.get(name, (0, logger.level))
        _quiet[name] = count + 1, level
        if logger.getEffectiveLevel() == logging.WARNING:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            count, level = _quiet.pop(name)
            if count > 1:
                _quiet[name] = count - 1, level
            else:
                logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal, for a while."""
    from transformers.utils import logging as told

    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()
