"""What the loopback Hub saw: every request, and the bytes of bodies that went each way."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal


@dataclass
class Exchange:
    """A request and its answer.

    Attributes:
        host: "hub", or "storage" where signed URLs lead.
        endpoint: the route's name, such as "resolve", "download", "commit"; "" where there is none.
        path: the URL's path, decoded.
        query: the URL's query, as it came.
        authorization: the header, or None.
        range: the Range header, or None.
        file: "org/name/path/in/repository" where a file was asked for; "org/name/SHA-256" where one was uploaded.
        status: of the answer; 0 as long as there is none.
        received, served: bytes of the two bodies that really travelled.
    """

    host: str
    endpoint: str
    method: str
    path: str
    query: str
    authorization: str | None
    range: str | None
    file: str | None = None
    status: int = 0
    received: int = 0
    served: int = 0


@dataclass
class Traffic:
    """Sums over exchanges."""

    requests: int = 0
    received: int = 0
    served: int = 0


def traffic(record: list[Exchange], by: Literal["endpoint", "file"]) -> dict[str, Traffic]:
    """Requests and body bytes for each endpoint or file; exchanges about no file are left out of the latter."""
    sums: dict[str, Traffic] = defaultdict(Traffic)
    for exchange in record:
        key = exchange.endpoint if by == "endpoint" else exchange.file
        if key is not None:
            sums[key].requests += 1
            sums[key].received += exchange.received
            sums[key].served += exchange.served
    return dict(sums)
