"""What lies in a folder."""

from pathlib import Path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def top_level(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
