"""Progress bars, on a terminal only, and lines; all on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal, for a while."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
