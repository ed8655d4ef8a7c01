"""One connection to the loopback Hub: reads requests, lets faults strike, sends replies."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from streammerge.testing.changes import CONFLICT
from streammerge.testing.faults import Fault
from streammerge.testing.record import Exchange
from streammerge.testing.routes import find_route
from streammerge.testing.state import EXPIRED, State
from streammerge.testing.store import CHUNK_BYTES
from streammerge.testing.wire import RefusalError, Reply, Request


class _ResetError(Exception):
    """The connection is to be reset now."""


class Handler(BaseHTTPRequestHandler):
    """Set in a subclass: the Hub's state, "hub" or "storage", and the event that ends all waiting."""

    state: State
    host: str
    stopping: Event
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out in two writes; do not wait for the first's receipt

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        ranged = self.headers["Range"] is not None
        self._faults = self.state.faults.strike(self.command, unquote(url.path), ranged)
        self._left: Iterator[bytes] | None = None
        found = find_route(self.host, "GET" if self.command == "HEAD" else self.command, url.path)
        endpoint = found[0].endpoint if found else ""
        self._exchange = Exchange(
            self.host,
            endpoint,
            self.command,
            unquote(url.path),
            url.query,
            self.headers["Authorization"],
            self.headers["Range"],
        )
        self.state.record.append(self._exchange)
        try:
            self._send(self._reply(url.path, url.query))
        except _ResetError:
            self._reset()
        except OSError:  # the client has hung up
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _reply(self, path: str, query: str) -> Reply:
        """The reply, after what strikes before the request takes effect."""
        chunks = self._chunks()
        try:
            self._strike_before()
            found = find_route(self.host, "GET" if self.command == "HEAD" else self.command, path)
            if found is None:
                raise RefusalError(404, f"Sorry, we can't find the page: {self.command} {path}")
            route, groups = found
            read = chunks if route.streams else iter([b"".join(chunks)])
            request = Request(
                method=self.command,
                groups=groups,
                query=dict(parse_qsl(query)),
                headers=self.headers,
                range=None if "ignore_range" in self._faults else self.headers["Range"],
                user=None if self.host == "storage" else self.state.user_of(self.headers["Authorization"]),
                chunks=lambda: read,
                exchange=self._exchange,
                base_url=self.state.url,
                raw_path=path,
            )
            with nullcontext() if route.streams else self.state.lock:
                return route.answer(self.state, request)
        except RefusalError as refusal:
            return refusal.reply
        finally:
            for _ in chunks:  # the next request on this connection starts after the body
                pass

    def _strike_before(self) -> None:
        faults = self._faults
        self._change_behind_its_back()
        if fault := faults.get("status"):
            raise RefusalError(fault.status, "this fault was asked for")
        if fault := faults.get("rate_limit"):
            refusal = RefusalError(429, "We had to rate limit you: you have sent too many requests")
            refusal.reply.headers["Retry-After"] = f"{fault.seconds:g}"
            raise refusal
        if "conflict" in faults:
            raise RefusalError(412, CONFLICT)
        if "expired" in faults:
            raise RefusalError(403, EXPIRED)

    def _change_behind_its_back(self) -> None:
        """Faults in the repository that the path names, before the request takes effect."""
        parts = self._exchange.path.removeprefix("/api/models").split("/")
        repository = self.state.repositories.get("/".join(parts[1:3]).removesuffix(".git"))
        if repository is None:
            return
        with self.state.lock:
            if fault := self._faults.get("moved_branch"):
                self.state.commit_bytes(repository, fault.branch, fault.files, "someone else's commit")
            if "lost_objects" in self._faults:
                repository.forget_uncommitted()

    def _chunks(self) -> Iterator[bytes]:
        """The request's body."""
        fault = self._faults.get("reset_upload")
        for chunk in self._sized_chunks() if self.headers["Content-Length"] else self._coded_chunks():
            self._exchange.received += len(chunk)
            if fault and self._exchange.received >= fault.nbytes:
                raise _ResetError
            yield chunk
        if fault:
            raise _ResetError

    def _sized_chunks(self) -> Iterator[bytes]:
        left = int(self.headers["Content-Length"])
        while left:
            chunk = self.rfile.read1(min(left, CHUNK_BYTES))
            if not chunk:
                raise ConnectionError("the client hung up in the middle of the body")
            left -= len(chunk)
            yield chunk

    def _coded_chunks(self) -> Iterator[bytes]:
        """Transfer-Encoding: chunked; nothing without it."""
        if "chunked" not in (self.headers["Transfer-Encoding"] or ""):
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _send(self, reply: Reply) -> None:
        faults = self._faults
        if "lost_reply" in faults:
            raise _ResetError
        if (fault := faults.get("stall")) and self.stopping.wait(fault.seconds):
            raise _ResetError
        if "wrong_range" in faults and "Content-Range" in reply.headers:
            reply.headers["Content-Range"] = _shifted(reply.headers["Content-Range"])
        self._exchange.status = reply.status
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(reply.size)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply)

    def _send_body(self, reply: Reply) -> None:
        cuts = [fault for kind in ("reset", "short_body") if (fault := self._faults.get(kind))]
        allowed = min([fault.nbytes for fault in cuts], default=reply.size)
        slow = self._faults.get("slow")
        for piece in _pieces(reply, self._faults.get("corrupt"), slow.nbytes if slow else CHUNK_BYTES):
            piece = piece[: allowed - self._exchange.served]
            if slow and self._exchange.served and self.stopping.wait(slow.seconds):
                raise _ResetError
            self._exchange.served += len(piece)  # before the client can have it and look at the record
            try:
                self.wfile.write(piece)
            except OSError:
                self._exchange.served -= len(piece)
                raise
        if "reset" in self._faults:
            self.stopping.wait(0.05)  # a reset makes the client's system drop what the client has not read yet
            raise _ResetError
        if "short_body" in self._faults:
            self.close_connection = True

    def _reset(self) -> None:
        """Close the connection with a TCP reset, as a failing network does, instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error clean."""


def _pieces(reply: Reply, corrupt: Fault | None, size: int) -> Iterator[bytes]:
    """A reply's body in pieces of a size."""
    done = 0
    for piece in _plain_pieces(reply, max(size, 1)):
        if corrupt and done <= corrupt.nbytes < done + len(piece):
            spoilt = bytearray(piece)
            spoilt[corrupt.nbytes - done] ^= 0xFF
            piece = bytes(spoilt)
        done += len(piece)
        yield piece


def _plain_pieces(reply: Reply, size: int) -> Iterator[bytes]:
    if isinstance(reply.body, bytes):
        yield from (reply.body[i : i + size] for i in range(0, len(reply.body), size))
        return
    with reply.body.path.open("rb") as file:
        file.seek(reply.body.start)
        left = reply.body.stop - reply.body.start
        while left:
            piece = file.read(min(size, left))
            left -= len(piece)
            yield piece


def _shifted(content_range: str) -> str:
    """`bytes 0-9/100` as `bytes 1-10/100`."""
    span, _, total = content_range.removeprefix("bytes ").partition("/")
    start, _, last = span.partition("-")
    return f"bytes {int(start) + 1}-{int(last) + 1}/{total}" if last else content_range
