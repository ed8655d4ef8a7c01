"""Docstrings of methods: the parts found, and every way to write one that a page could not show."""

from typing import Any

import pytest

from streammerge.docstrings import Documentation, Passage, parse

GOOD = """Do this to
    that:

        a = b
            + c

        d = e

    and then that `too`.

    Convention: as there,
    and more.

    More yet:

        x = y
    Reference: Author, Title, arXiv 2306.01708.

    Raises:
        RecipeError: too
            many models.
        CheckpointError: no: such thing.
    """


def documented(text: str | None) -> type:
    members: dict[str, Any] = {"__doc__": text}
    return type("Documented", (), members)


def test_the_parts() -> None:
    assert parse(documented(GOOD)) == Documentation(
        text=(
            Passage("Do this to that:", False),
            Passage("a = b\n    + c\n\nd = e", True),
            Passage("and then that `too`.", False),
        ),
        convention=(Passage("as there, and more.", False), Passage("More yet:", False), Passage("x = y", True)),
        reference="Author, Title, arXiv 2306.01708.",
        raises=(("RecipeError", "too many models."), ("CheckpointError", "no: such thing.")),
    )


def test_nothing_is_raised() -> None:
    assert parse(documented("Do.\n\nConvention: none.\nReference: none.")).raises == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Convention: as", "As"), "found: Reference, Raises"),
        (("Reference: ", ""), "found: Convention, Raises"),
        (("Convention:", "Conventions:"), "found: Conventions, Reference, Raises"),
        (("    Raises:", "    Note: this.\n\n    Raises:"), "found: Convention, Reference, Note, Raises"),
        (("    Raises:", "    Convention: again.\n\n    Raises:"), "found: Convention, Reference, Convention, Raises"),
        (("        d = e", "    d = e\n        f = g"), "a formula is indented"),
        (("that:\n\n", "that:\n"), "a formula is indented"),
        (("as there,\n    and more.\n\n    More yet:\n\n        x = y", ""), "is empty"),
        (("as there,\n    and more.\n\n    More yet:\n", ""), "Convention begins with prose"),
        (("Author, Title, arXiv 2306.01708.", ""), "is empty"),
        (("Author, Title, arXiv 2306.01708.", "A.\n\n    B."), "Reference is one paragraph"),
        (("Do this to\n    that:\n\n        a = b", "Convention: a = b"), "found: Convention, Convention"),
        (("RecipeError: too", "RecipeEror: too"), "an error of ours: 'RecipeEror"),
        (("RecipeError: too", "Sequence: too"), "an error of ours"),
        (("RecipeError: too", "too"), "an error of ours"),
        (
            ("        RecipeError: too\n            many models.\n        CheckpointError: no: such thing.\n", ""),
            "Raises",
        ),
    ],
)
def test_what_is_refused(change: tuple[str, str], message: str) -> None:
    assert GOOD.count(change[0]) == 1
    with pytest.raises(ValueError, match=f"^Documented: .*{message}"):
        parse(documented(GOOD.replace(*change)))


@pytest.mark.parametrize("text", [None, ""])
def test_a_docstring_of_its_own(text: str | None) -> None:
    with pytest.raises(ValueError, match="Documented has no docstring of its own"):
        parse(documented(text))
    child = type("Child", (documented(GOOD),), {})
    with pytest.raises(ValueError, match="Child has no docstring of its own"):
        parse(child)


def test_a_docstring_without_text() -> None:
    with pytest.raises(ValueError, match="is empty"):
        parse(documented("Convention: none.\nReference: none."))
