"""What every command prints: a text or JSON, on standard output."""

from __future__ import annotations

import json
from typing import Any

from streammerge.text import visible


def show(value: Any) -> None:
    print(safe_lines(value) if isinstance(value, str) else json.dumps(value, indent=2))


def safe_lines(text: str) -> str:
    """What goes to the terminal: nothing in it but our own line ends drives it, see `visible`."""
    return "\n".join(map(visible, text.split("\n")))
