"""What every test here asks for: one clear message, exit 1, nothing written, inputs untouched."""

from collections.abc import Callable
from pathlib import Path

from tiny_models import Models, Run, content

Spoil = Callable[[Path], object]
TASK_ARITHMETIC = ("--method", "task_arithmetic")


def refused(run: Run, root: Path, arguments: tuple[object, ...], *words: str) -> str:
    """The message of a command that must be refused and leave everything below `root` as it is."""
    before = content(root)
    result = run(*arguments)
    assert result.code == 1, result.err
    assert result.out == ""
    first, *others = result.err.splitlines()
    assert first.startswith("streammerge: error: ")
    assert all(line.startswith("  - ") for line in others)
    assert not [word for word in words if word not in result.err], result.err
    assert content(root) == before
    return result.err


def command(models: Models, tmp_path: Path, *options: object) -> tuple[object, ...]:
    return ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "--out", tmp_path / "out", "-q", *options)
