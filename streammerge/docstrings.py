"""The docstrings of the merge methods, taken apart strictly, so that pages made from them cannot rot.

What the method computes, then `Convention:`, `Reference:` and, where it raises, `Raises:`. Formulas are indented, with
blank lines around them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass

from streammerge import errors


@dataclass(frozen=True)
class Passage:
    """A paragraph in one line, or the lines of a formula."""

    text: str
    formula: bool


@dataclass(frozen=True)
class Documentation:
    """A method's docstring in its parts; `raises`: error and reason."""

    text: tuple[Passage, ...]
    convention: tuple[Passage, ...]
    reference: str
    raises: tuple[tuple[str, str], ...]


def parse(cls: type) -> Documentation:
    """The parts of a method's own docstring.

    Raises:
        ValueError: a part is missing, given twice, empty, in the wrong place or of another form.
    """
    raw = cls.__dict__.get("__doc__")
    if not raw:
        raise ValueError(f"{cls.__name__} has no docstring of its own (python -OO drops them)")
    start, *rest = re.split(r"^([A-Z]\w*):(?=\s|$)", inspect.cleandoc(raw), flags=re.MULTILINE)
    names, bodies = rest[::2], [body.removeprefix(" ") for body in rest[1::2]]
    if names not in (["Convention", "Reference"], ["Convention", "Reference", "Raises"]):
        found = ", ".join(names) or "none"
        raise ValueError(
            f"{cls.__name__}: the docstring's sections are Convention, Reference, [Raises]; found: {found}"
        )
    text, convention, reference = (_read(part.strip("\n"), cls) for part in (start, *bodies[:2]))
    if len(reference) != 1 or convention[0].formula or reference[0].formula:
        raise ValueError(f"{cls.__name__}: Convention begins with prose, and Reference is one paragraph of it")
    return Documentation(text, convention, reference[0].text, _raises(bodies[2], cls) if bodies[2:] else ())


def _read(text: str, cls: type) -> tuple[Passage, ...]:
    """Paragraphs and formulas; formulas with only a blank line between them are one."""
    passages: list[Passage] = []
    for paragraph in filter(None, re.split(r"\n\s*\n", text)):
        indented = {line[0] == " " for line in paragraph.splitlines()}
        if len(indented) > 1:
            raise ValueError(f"{cls.__name__}: a formula is indented, with blank lines around it: {paragraph!r}")
        if not indented.pop():
            passages.append(Passage(" ".join(paragraph.split()), False))
        elif passages and passages[-1].formula:
            passages[-1] = Passage(f"{passages[-1].text}\n\n{textwrap.dedent(paragraph)}", True)
        else:
            passages.append(Passage(textwrap.dedent(paragraph), True))
    if not passages:
        raise ValueError(f"{cls.__name__}: a part of the docstring is empty")
    return tuple(passages)


def _raises(body: str, cls: type) -> tuple[tuple[str, str], ...]:
    """What stands under Raises: an error of ours and its reason, which may go on in deeper lines."""
    found = []
    for item in re.split(r"\n(?=\S)", textwrap.dedent(body.strip("\n"))):
        name, colon, reason = " ".join(item.split()).partition(": ")
        error = getattr(errors, name, None)
        if not (colon and isinstance(error, type) and issubclass(error, errors.StreammergeError)):
            raise ValueError(f"{cls.__name__}: Raises needs lines `Error: reason` with an error of ours: {item!r}")
        found.append((name, reason))
    return tuple(found)
