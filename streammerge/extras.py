"""How to get what is not installed with the package: it lies on no registry, so from its checkout."""


def get_it(extra: str) -> str:
    """The command that installs an extra of pyproject.toml."""
    return f"pip install -c constraints.txt '.[{extra}]' in the checkout"
