"""A small Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client and your own tests.

    with Hub() as hub:
        hub.add("org/base", folder)
        subprocess.run(command, env=os.environ | hub.environment())
        hub.read("org/merged", "model.safetensors")

The client reads HF_ENDPOINT when it is imported: start a new process, or pass `HfApi(endpoint=hub.url)`. What it
keeps is models only. It listens on two ports: the Hub, and the storage that signed URLs lead to without a token.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from threading import Event, Lock, Thread
from typing import Any, Literal, Self

from streammerge.branches import branch_flaw
from streammerge.testing.faults import Armed, Fault, require_bytes
from streammerge.testing.handler import Handler
from streammerge.testing.record import Traffic, traffic
from streammerge.testing.repository import Repository
from streammerge.testing.state import State
from streammerge.testing.store import File, read_chunks
from streammerge.testing.wire import User


class Hub(State):
    """The server; use as a context manager.

    Args:
        users: by token; every other token is refused. None: any token is good, and belongs to "me" who may do all.
        folder: where to keep contents; a temporary one, removed at the end, if None.
        part_bytes: larger objects are uploaded in parts of this size.
        page_size: entries of a file tree in one answer.
        redirects: LFS files are served from the storage, by signed URLs; else by the Hub itself.
        link_seconds: how long a signed URL is good.

    Attributes:
        url: what HF_ENDPOINT must be.
        storage_url: where signed URLs lead.
        repositories: by id.
        record: every request, to the Hub and its storage, with the bytes that travelled.
    """

    def __init__(
        self,
        users: Mapping[str, User] | None = None,
        *,
        folder: Path | None = None,
        part_bytes: int = 64 << 20,
        page_size: int = 1000,
        redirects: bool = True,
        link_seconds: float = 3600.0,
    ) -> None:
        self._temporary = folder is None
        super().__init__(folder or Path(tempfile.mkdtemp(prefix="loopback-hub-")), users)
        self.part_bytes, self.page_size = part_bytes, page_size
        self.redirects, self.link_seconds = redirects, link_seconds
        self._stopping = Event()
        self._servers = [_Server(self, host, self._stopping) for host in ("hub", "storage")]
        self.url, self.storage_url = (server.url for server in self._servers)

    def add(self, repository: str, folder: str | Path, branch: str = "main") -> str:
        """Commit a folder's content to a branch, both made if need be; returns the commit.

        Raises:
            NotADirectoryError: there is no such folder.
            ValueError: the repository is not called org/name, or the branch as git calls none.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: no such folder, which {repository} was to hold")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ValueError(f"{repository!r}: a repository is called org/name")
        if flaw := branch_flaw(branch):
            raise ValueError(f"{branch!r} is no name for a branch: {flaw}")
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        stored = {path: self.blobs.add_file(path, read_chunks(source)) for path, source in files.items()}
        with self.lock:
            entry = self.repositories.setdefault(repository, Repository(repository))
            entry.objects |= {file.sha256 for file in stored.values() if file.lfs}
            return entry.commit(branch, stored, f"add {folder.name}").oid

    def files(self, repository: str, revision: str = "main") -> dict[str, File]:
        """The files of a revision, by path.

        Raises:
            LookupError: no such repository or revision, from this and the calls below.
        """
        return dict(self._known(repository, revision).files(revision))

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        """A file's content."""
        files = self._known(repository, revision).files(revision)
        if path not in files:
            raise LookupError(f"{repository}@{revision} has no file {path!r}; it has: {', '.join(sorted(files))}")
        return self.content_path(files[path].sha256).read_bytes()

    def move_branch(self, repository: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch as someone else would; returns the commit.

        Raises:
            TypeError: a file that is not bytes.
        """
        require_bytes(files)
        with self.lock:
            return self.commit_bytes(self._known(repository), branch, files, "someone else's commit").oid

    def lose_object(self, repository: str, sha256: str) -> None:
        """Forget an LFS object that was uploaded and not committed, as the Hub does after a while."""
        self._known(repository).objects.discard(sha256)

    def misbehave(self, fault: Fault) -> Armed:
        """Arm a fault; the returned object counts the requests it has struck."""
        return self.faults.arm(fault)

    def behave(self) -> None:
        """Disarm all faults."""
        self.faults.clear()

    @property
    def requests(self) -> list[tuple[str, str, str | None]]:
        """(method, decoded path, Authorization header) of the requests to the Hub itself."""
        return [(e.method, e.path, e.authorization) for e in list(self.record) if e.host == "hub"]

    def traffic(self, by: Literal["endpoint", "file"] = "endpoint") -> dict[str, Traffic]:
        """Requests, and body bytes received and served, for each endpoint or each file."""
        return traffic(list(self.record), by)

    def environment(self) -> dict[str, str]:
        """What a client's process must have in its environment to talk to this Hub and to nobody else."""
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", **direct}

    def _known(self, repository: str, revision: str | None = None) -> Repository:
        if repository not in self.repositories:
            there = ", ".join(sorted(self.repositories)) or "none"
            raise LookupError(f"this Hub has no repository {repository!r}; it has: {there}")
        found = self.repositories[repository]
        if revision is not None and found.commit_of(revision) is None:
            there = ", ".join([*found.branches, *found.tags, *found.pulls])
            raise LookupError(f"{repository} has no revision {revision!r}; it has: {there}")
        return found

    def __enter__(self) -> Self:
        for server in self._servers:
            server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        for server in self._servers:
            server.stop()
        if self._temporary:
            shutil.rmtree(self.folder)


class _Server(ThreadingHTTPServer):
    """One port of the Hub, with a thread for each connection."""

    request_queue_size = 128

    def __init__(self, state: State, host: str, stopping: Event) -> None:
        settings: dict[str, Any] = {"state": state, "host": host, "stopping": stopping}
        super().__init__(("127.0.0.1", 0), type("HubHandler", (Handler,), settings))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._connections: set[socket] = set()
        self._lock = Lock()
        self.daemon_threads = False  # so that the end waits for them

    def start(self) -> None:
        self._thread = Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """End the connections too: a client may keep one open for its next request."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # it has ended by itself
                    connection.shutdown(SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when they like; anything else is a bug, and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
