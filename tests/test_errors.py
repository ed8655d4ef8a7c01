"""The error tree: as drawn, all catchable at once, every message intact."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

from streammerge import errors
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError, MissingTensorError, StreammergeError

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}


def drawn_tree() -> dict[str, set[str]]:
    """Class name -> names of its bases, read off the drawing in the module's docstring."""
    tree: dict[str, set[str]] = {}
    path: list[tuple[int, str]] = []  # (column, name) from the root down
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"[ |]*(?:\+-- )?([A-Z]\w+Error)(?: \((\w+)\))?(?: |$)", line)
        if match is None or not line.startswith("    "):
            continue
        path = [(column, name) for column, name in path if column < match.start(1)]
        tree[match[1]] = {path[-1][1] if path else "Exception"} | ({match[2]} if match[2] else set())
        path.append((match.start(1), match[1]))
    return tree


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn_tree() == {name: {base.__name__ for base in cls.__bases__} for name, cls in CLASSES.items()}


def test_the_tree_has_a_branch() -> None:
    assert drawn_tree()["HeaderError"] == {"CheckpointError"}
    assert drawn_tree()["MissingTensorError"] == {"CheckpointError", "KeyError"}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES.values() if cls is not IncompatibleCheckpointsError])
def test_every_error_is_caught_by_the_root_and_keeps_its_message(cls: type[StreammergeError]) -> None:
    message = "model 'a', file b: it's \"quoted\""
    with pytest.raises(StreammergeError) as caught:
        raise cls(message)
    assert type(caught.value) is cls
    assert str(caught.value) == message


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_error_can_come_from_another_process(cls: type[StreammergeError]) -> None:
    lines = (["one", "an\x1bother"],) if cls is IncompatibleCheckpointsError else ()
    error = cls("model 'a': \x1b[31m", *lines)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"StreammergeError"}))
def test_every_error_is_raised_somewhere(name: str) -> None:
    sources = Path(errors.__file__).parent.rglob("*.py")
    assert any(f"raise {name}(" in path.read_text("utf-8") for path in sources)


def test_a_missing_tensor_is_a_key_error_without_quotes() -> None:
    with pytest.raises(KeyError) as caught:
        raise MissingTensorError("model m: there is no tensor 'x'")
    assert str(caught.value) == "model m: there is no tensor 'x'"


def test_incompatible_checkpoints_lists_every_mismatch() -> None:
    error = IncompatibleCheckpointsError("a and b differ:", iter(["one", "two"]))
    assert error.mismatches == ("one", "two")
    assert str(error) == "a and b differ:\n  - one\n  - two"
    assert isinstance(error, CheckpointError)
