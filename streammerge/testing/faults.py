"""How the loopback Hub misbehaves: which request, which time, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from threading import Lock
from typing import Literal, get_args

Kind = Literal[
    "status",
    "rate_limit",
    "conflict",
    "expired",
    "reset",
    "reset_upload",
    "lost_reply",
    "short_body",
    "ignore_range",
    "wrong_range",
    "corrupt",
    "slow",
    "stall",
    "moved_branch",
    "lost_objects",
]

_OF_BODIES: tuple[Kind, ...] = ("reset", "short_body", "corrupt", "slow")
_OF_RANGES: tuple[Kind, ...] = ("ignore_range", "wrong_range")


@dataclass(frozen=True)
class Fault:
    """A misbehaviour, and the requests that meet it.

    status:        the answer is `status`; the request has no effect.
    rate_limit:    429 with `Retry-After: seconds`; no effect.
    conflict:      412, the answer to a commit whose parent is no longer the branch's head; no effect.
    expired:       403, the storage's answer to a signed URL that has expired; no effect.
    reset:         the connection is reset after `nbytes` of the answer's body.
    reset_upload:  the connection is reset after `nbytes` of the request's body; no effect.
    lost_reply:    the request has its effect, then the connection is reset instead of an answer.
    short_body:    Content-Length is right, but the connection is closed after `nbytes` of the body.
    ignore_range:  the whole file with 200, whatever range was asked for.
    wrong_range:   206 with the right bytes and a Content-Range one byte too far.
    corrupt:       the byte at offset `nbytes` of the body is not what it should be.
    slow:          the body comes `nbytes` at a time with `seconds` in between.
    stall:         nothing comes for `seconds`, then the right answer.
    moved_branch:  just before the request, someone else commits `files` to `branch`.
    lost_objects:  just before the request, the repository forgets the LFS objects that no commit needs.

    A HEAD request has no body to spoil: reset, short_body, corrupt and slow pass it by. Requests without a range are
    passed by by ignore_range and wrong_range. Behind a redirect the bytes come from `/download/*`.

    Args:
        kind: one of those above.
        path: pattern (`*`, `?`) of the decoded URL path, on the Hub or its storage: `*/resolve/*`, `*-00002-of-*`.
        method: pattern of the method.
        times: how many matching requests it strikes, one after the other; None for all.
        after: how many matching requests it lets pass before.
        status, seconds, nbytes: what the kinds above say of them.
        branch, files: of moved_branch; files are path -> bytes.

    Raises:
        ValueError: no such kind.
        TypeError: files that are not bytes.
    """

    kind: Kind
    path: str = "*"
    method: str = "*"
    times: int | None = 1
    after: int = 0
    status: int = 503
    seconds: float = 0.0
    nbytes: int = 0
    branch: str = "main"
    files: Mapping[str, bytes] = field(default_factory=lambda: {"from-someone-else.txt": b"hello\n"})

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no fault is called {self.kind!r}; there are: {', '.join(get_args(Kind))}")
        require_bytes(self.files)


def require_bytes(files: Mapping[str, bytes]) -> None:
    """Raises TypeError for a file whose content is not bytes: later, nobody would know where it came from."""
    for path, content in files.items():
        if not isinstance(content, bytes):
            raise TypeError(f"the content of {path!r} must be bytes, not {type(content).__name__}")


@dataclass
class Armed:
    """A fault at work. Attributes: how many requests it matched, and how many it struck."""

    fault: Fault
    matched: int = 0
    struck: int = 0

    def strikes(self, method: str, path: str, ranged: bool) -> bool:
        """Whether this request, one more, is hit."""
        fault = self.fault
        if not (fnmatchcase(path, fault.path) and fnmatchcase(method, fault.method)):
            return False
        if (method == "HEAD" and fault.kind in _OF_BODIES) or (not ranged and fault.kind in _OF_RANGES):
            return False
        self.matched += 1
        hit = self.matched > fault.after and (fault.times is None or self.struck < fault.times)
        self.struck += hit
        return hit


class Faults:
    """All armed faults."""

    def __init__(self) -> None:
        self._armed: list[Armed] = []
        self._lock = Lock()

    def arm(self, fault: Fault) -> Armed:
        armed = Armed(fault)
        with self._lock:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def strike(self, method: str, path: str, ranged: bool) -> dict[Kind, Fault]:
        """The faults that this request meets, of each kind the one armed first."""
        with self._lock:
            struck = [armed.fault for armed in self._armed if armed.strikes(method, path, ranged)]
        return {fault.kind: fault for fault in reversed(struck)}
