"""Routes that give a file's bytes: resolve on the Hub, and the storage that its signed URLs lead to."""

import re

from streammerge.testing.repository import Commit, Repository
from streammerge.testing.state import State
from streammerge.testing.store import File
from streammerge.testing.wire import Content, RefusalError, Reply, Request


def resolve(state: State, request: Request) -> Reply:
    """GET, HEAD /{repository}/resolve/{revision}/{path}: the file, or for LFS a redirect to its storage."""
    name, revision, path = request.groups
    repository = state.readable(request, name)
    request.exchange.file = f"{name}/{path}"
    commit = state.commit_of(repository, revision)
    state.require_access(request, repository)
    file = commit.files.get(path)
    if file is None:
        raise RefusalError(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if state.redirects:
            location = state.sign(f"/download/{name}/{file.sha256}/{path}")
            return Reply(302, b"Found. Redirecting to the storage", headers | {"Location": location})
    return content(state, request, file, headers)


def download(state: State, request: Request) -> Reply:
    """GET, HEAD /download/{repository}/{sha256}/{path} on the storage host."""
    name, sha256, path = request.groups
    request.exchange.file = f"{name}/{path}"
    state.require_signature(request, f"/download/{name}/{sha256}/{path}")
    size = state.blobs.path(sha256).stat().st_size
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{sha256}"'}
    return content(state, request, File(sha256, size, "", True), headers)


def content(state: State, request: Request, file: File, headers: dict[str, str]) -> Reply:
    """A file's bytes, or the one range asked for. Several ranges get the whole file, which HTTP allows."""
    path, size = state.blobs.path(file.sha256), file.size
    headers = {"Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
    if match is None or not any(match.groups()):
        return Reply(200, Content(path, 0, size), headers)
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        return Reply(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return Reply(206, Content(path, start, stop), headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def entry(path: str, file: File, commit: Commit, repository: Repository, expand: bool) -> dict[str, object]:
    """How tree and paths-info describe a file."""
    described: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        described["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    if expand:
        last = next(c for c in repository.history(commit.oid) if _brought(repository, c, path, file))
        described["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return described


def _brought(repository: Repository, commit: Commit, path: str, file: File) -> bool:
    """Whether the file came into being with this commit."""
    return commit.parent is None or repository.commits[commit.parent].files.get(path) != file
