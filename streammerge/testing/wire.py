"""Requests and replies of the loopback Hub, between the socket and the routes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

from streammerge.testing.record import Exchange


@dataclass(frozen=True)
class User:
    """Who a token belongs to.

    Attributes:
        name: also the namespace that is the user's own.
        organizations: further namespaces the user may read and write; None for all there are.
        can_write: False for a read-only token.
    """

    name: str
    organizations: tuple[str, ...] | None = ()
    can_write: bool = True

    def belongs_to(self, namespace: str) -> bool:
        return self.organizations is None or namespace in (self.name, *self.organizations)


@dataclass
class Request:
    """What a route sees.

    Attributes:
        groups: the parts of the path that the route's pattern names, decoded.
        query: the last value of each parameter.
        chunks: reads the body piece by piece, once.
    """

    method: str
    groups: tuple[str, ...]
    query: dict[str, str]
    headers: Message
    range: str | None
    user: User | None
    chunks: Callable[[], Iterator[bytes]]
    exchange: Exchange
    base_url: str
    raw_path: str

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")


@dataclass(frozen=True)
class Content:
    """The bytes [start, stop) of a file on disk."""

    path: Path
    start: int
    stop: int


@dataclass
class Reply:
    """A status, headers and a body."""

    status: int = 200
    body: bytes | Content = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stop - self.body.start


class RefusalError(Exception):
    """An error reply, with the two headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        self.reply = Reply(status, json.dumps({"error": message, **body}).encode(), headers)


def json_reply(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})
