"""A minimal Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client.

    with Hub() as hub:
        hub.add("org/base", folder)
        ...                                # HF_ENDPOINT=hub.url in the environment of a new process

It answers: model info, file tree, and HEAD and GET of files with ETag, X-Repo-Commit and Range.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A model repository: folders by commit, commits by branch."""

    folders: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.folders else None)


class Hub:
    """The server; use as a context manager.

    Attributes:
        url: what HF_ENDPOINT must be.
        repositories: by id.
        requests: (method, path, Authorization header) of every request so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Commit a folder's content to a branch; returns the commit."""
        commit = hashlib.sha1(f"{repository} {branch} {folder}".encode()).hexdigest()
        entry = self.repositories.setdefault(repository, Repository())
        entry.folders[commit] = folder
        entry.branches[branch] = commit
        return commit

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _RefusalError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        routes: dict[str, Callable[..., None]] = {
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._file,
        }
        try:
            for pattern, answer in routes.items():
                if match := re.fullmatch(pattern, path):
                    return answer(*match.groups())
            raise _RefusalError(404, "EntryNotFound", "no such page")
        except _RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _info(self, name: str, revision: str | None) -> None:
        commit, folder = self._find(name, revision or "main")
        siblings = [{"rfilename": path} for path in _files(folder)]
        self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        _, folder = self._find(name, revision)
        self._json(
            [{"type": "file", "path": p, "size": len(raw), "oid": _etag(raw)} for p, raw in _files(folder).items()]
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        commit, folder = self._find(name, revision)
        if self.hub.repositories[name].gated:
            raise _RefusalError(403, "GatedRepo", f"Access to model {name} is restricted")
        raw = _files(folder).get(path)
        if raw is None:
            raise _RefusalError(404, "EntryNotFound", f"{path} does not exist in {name}")
        headers = {"ETag": f'"{_etag(raw)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if match is None:
            return self._send(200, raw, headers)
        start, stop = int(match[1]), min(int(match[2] or len(raw)) + 1, len(raw))
        if start >= len(raw):
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(raw)}"})
        return self._send(206, raw[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(raw)}"})

    def _find(self, name: str, revision: str) -> tuple[str, Path]:
        repository = self.hub.repositories.get(name)
        if repository is None:
            raise _RefusalError(404, "RepoNotFound", f"{name} does not exist")
        commit = repository.commit_of(revision)
        if commit is None:
            raise _RefusalError(404, "RevisionNotFound", f"{name} has no revision {revision}")
        return commit, repository.folders[commit]

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error clean."""


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _etag(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
