"""Which names git takes for a branch."""

import re

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")


def branch_flaw(name: str) -> str | None:
    """Why git takes no branch of that name (the rules of `git check-ref-format --branch`); None where it does."""
    parts = name.split("/")
    if found := _FORBIDDEN.search(name):
        return f"it has the character {found.group()!r} in it"
    if not name:
        return "it is empty"
    if "" in parts:
        return "it begins or ends with a slash, or has two in a row"
    if ".." in name or "@{" in name:
        return "it has .. or @{ in it"
    if name.endswith(".") or any(part.startswith(".") or part.endswith(".lock") for part in parts):
        return "a part of it begins with a dot, or ends with .lock or a dot"
    if name.startswith("-") or name in ("@", "HEAD"):
        return "git gives it another meaning"
    return None
