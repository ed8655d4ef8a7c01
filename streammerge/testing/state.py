"""All that the loopback Hub knows, and who may see and change it."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from threading import RLock
from urllib.parse import quote

from streammerge.testing.faults import Faults
from streammerge.testing.record import Exchange
from streammerge.testing.repository import Commit, Files, Repository
from streammerge.testing.store import Blobs
from streammerge.testing.wire import RefusalError, Request, User
from streammerge.testing.xet_store import XetStore

ANYBODY = User("me", organizations=None)


class State:
    """Repositories, their bytes, users, the record of requests; `lock` guards what requests change."""

    def __init__(self, folder: Path, users: Mapping[str, User] | None) -> None:
        self.folder = folder
        self.users = users
        self.url = self.storage_url = ""
        self.repositories: dict[str, Repository] = {}
        self.blobs = Blobs(folder / "blobs")
        self.xet = XetStore(folder / "xorbs")
        self.record: list[Exchange] = []
        self.faults = Faults()
        self.lock = RLock()
        self.page_size = 1000
        self.part_bytes = 64 << 20
        self.redirects = True
        self.link_seconds = 3600.0
        self._key = secrets.token_bytes(16)
        self._xet_tokens: dict[str, tuple[str, str]] = {}

    def user_of(self, authorization: str | None) -> User | None:
        """Whose request it is; None for nobody's."""
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        user = ANYBODY if self.users is None else self.users.get(token)
        if user is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, request: Request, name: str) -> Repository:
        """A repository the request's user may see."""
        repository = self.repositories.get(name)
        namespace = name.partition("/")[0]
        hidden = repository is not None and repository.private
        if hidden and request.user is not None and request.user.belongs_to(namespace):
            hidden = False
        if repository is None or hidden:
            if request.user is None:
                raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, request: Request, name: str, by_pull_request: bool = False) -> Repository:
        """A repository the request's user may change; anyone logged in may open a pull request."""
        repository = self.readable(request, name)
        user = require_writer(request)
        if not (by_pull_request or user.belongs_to(name.partition("/")[0])):
            advice = "pass `create_pr=1` as a query parameter to create a Pull Request"
            raise RefusalError(403, f"Forbidden: {advice}")
        return repository

    def require_access(self, request: Request, repository: Repository) -> None:
        """Refuse the files of a gated repository to whoever has not been let in."""
        name = repository.id
        if not repository.gated or (request.user is not None and request.user.name in repository.granted):
            return
        restricted = f"Access to model {name} is restricted"
        if request.user is None:
            message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
            raise RefusalError(401, message, "GatedRepo")
        message = f"{restricted} and you are not in the authorized list. Visit {self.url}/{name} to ask for access."
        raise RefusalError(403, message, "GatedRepo")

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        oid = repository.commit_of(revision)
        if oid is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    def commit_bytes(self, repository: Repository, branch: str, contents: Mapping[str, bytes], title: str) -> Commit:
        """Add files to a branch as someone else would."""
        oid = repository.commit_of(branch)
        files: Files = repository.commits[oid].files if oid else {}
        added = {path: self.blobs.add_file(path, [content]) for path, content in contents.items()}
        repository.objects |= {file.sha256 for file in added.values() if file.lfs}
        return repository.commit(branch, {**files, **added}, title, author="someone-else")

    def object_size(self, sha256: str) -> int:
        """Bytes of an object that was uploaded, in whatever way."""
        xet = self.xet.by_sha256.get(sha256)
        return self.blobs.path(sha256).stat().st_size if xet is None else xet.size

    def content_path(self, sha256: str) -> Path:
        """Where an object's bytes lie; what came through Xet is put together when it is first asked for."""
        with self.lock:
            if sha256 not in self.blobs:
                self.blobs.add(self.xet.unpack(self.xet.by_sha256[sha256]), sha256)
        return self.blobs.path(sha256)

    def xet_token(self, name: str, scope: str) -> str:
        """A token for a repository's Xet objects."""
        token = secrets.token_urlsafe(16)
        self._xet_tokens[token] = (name, scope)
        return token

    def require_xet_token(self, request: Request, scope: str) -> str:
        """The repository that the request's token is for; a token to write may read."""
        token = (request.exchange.authorization or "").removeprefix("Bearer ")
        name, granted = self._xet_tokens.get(token, ("", ""))
        if scope not in (granted, "read") or not granted:
            raise RefusalError(401, f"no token to {scope} Xet objects")
        return name

    def sign(self, path: str) -> str:
        """A URL on the storage host that will be honoured for a while, without a token."""
        expires = str(int(1000 * (time.time() + self.link_seconds)))
        return f"{self.storage_url}{quote(path)}?Expires={expires}&Signature={self._signature(path, expires)}"

    def require_signature(self, request: Request, path: str) -> None:
        expires, signature = request.query.get("Expires", "0"), request.query.get("Signature", "")
        if not hmac.compare_digest(signature, self._signature(path, expires)):
            raise RefusalError(403, "AccessDenied: no such signature")
        if time.time() * 1000 > int(expires):
            raise RefusalError(403, EXPIRED)

    def expire_links(self) -> None:
        """From now on every signed URL handed out so far is refused."""
        self._key = secrets.token_bytes(16)

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()


EXPIRED = "AccessDenied: Request has expired"


def require_writer(request: Request) -> User:
    """Whoever sends the request, if their token may change anything."""
    if request.user is None:
        raise RefusalError(401, "Invalid username or password.")
    if not request.user.can_write:
        raise RefusalError(403, "Forbidden: you must use a write token to upload to a repository.")
    return request.user
