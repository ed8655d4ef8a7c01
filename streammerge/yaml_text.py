"""YAML from strangers: plain values only, each key once, bounded in size, depth and number."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.reader import ReaderError

_BOOL = "tag:yaml.org,2002:bool"
_DEEPEST = 50
_LONGEST_NUMBER = 100  # characters


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where PyYAML would keep the last one.

    Only true and false are booleans, as in YAML 1.2: `norm_tolerance: off` must stay the word.
    What an alias stands for counts every time it is used: nine lines of nine aliases each are a billion values.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in pairs if tag != _BOOL]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self._most, self._depth, self._count = most, 0, 0
        self._sizes: dict[int, int] = {}  # id of a node -> how many values it is

    def fetch_flow_collection_start(self, token: Any) -> None:
        """The scanner is ahead of the parser, and takes time with the square of the open brackets."""
        if self.flow_level >= _DEEPEST:
            raise yaml.YAMLError(f"nested more than {_DEEPEST} deep")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before = self._count
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's
        if not isinstance(event, yaml.AliasEvent) and getattr(event, "tag", None) is not None:
            raise _flaw(f"the tag {event.tag!r}: plain values need none", event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _flaw(f"{event.anchor!r} refers to itself", event.start_mark)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
        if self._count > self._most:
            raise yaml.YAMLError(f"more than {self._most} values")
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if len(node.value) > _LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
            raise _flaw(f"a number of {len(node.value)} characters", node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _flaw(f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


# What PyYAML says -> what is wrong and what to do, for the slips that recipes have.
_IN_WORDS = {
    "character '\\t' that cannot start any token": "a tab cannot stand at the start: use blanks",
    "that cannot start any token": "a value that begins with such a character goes into quotes",
    "found undefined alias": "a value that begins with * goes into quotes",
    "mapping values are not allowed here": "a second `key: value` in a line, or one indented unlike the lines above; a "
    "value with a colon goes into quotes",
    "expected <block end>, but found": "indented unlike the lines above",
}
# The same, where what is wrong began earlier than PyYAML noticed.
_BEGAN = {
    "expected alphabetic or numeric character": "a value that begins with * or & goes into quotes",
    "could not find expected ':'": "a line that is no `key: value`: is a colon missing, or the blank behind it?",
    "but got '<stream end>'": "a bracket is not closed",
    "found unexpected end of stream": "a quotation mark is not closed",
}


def parse_yaml(text: str, most: int, *, place: bool = True) -> Any:
    """The plain values of a YAML document.

    Args:
        text: the document.
        most: values there may be, what an alias repeats counted anew.
        place: whether line and column help to find what is wrong.

    Raises:
        ValueError: with the reason, in one line.
    """
    try:
        return _Loader(text, most).get_single_data()
    except yaml.MarkedYAMLError as error:
        problem, mark = error.problem or "", error.problem_mark
        known = next((known for known in (*_IN_WORDS, *_BEGAN) if known in problem), "")
        mark = error.context_mark or mark if known in _BEGAN else mark
        told = {**_IN_WORDS, **_BEGAN}.get(known, problem)
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    except ReaderError as error:
        told = f"the character U+{ord(text[error.position]):04X} cannot stand in a text"
        line = text.count("\n", 0, error.position)
        column = error.position - text.rfind("\n", 0, error.position) - 1
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: a date that is none
        told, place = str(error), False
    where = f"line {line + 1}, column {column + 1}: " if place else ""
    raise ValueError(where + " ".join(told.split())[:200]) from None


def _flaw(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
