"""Routes that give a file's bytes: resolve on the Hub, and the storage that its signed URLs lead to."""

import re
from pathlib import Path

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
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers |= _xet_headers(state, name, commit, file)
        if state.redirects:
            location = state.sign(f"/download/{name}/{file.sha256}/{path}")
            return Reply(302, b"", headers | {"Location": location})
    return content(request, state.content_path(file.sha256), headers)


def _xet_headers(state: State, name: str, commit: Commit, file: File) -> dict[str, str]:
    """What a client with Xet takes instead of the redirect."""
    xet = state.xet.by_sha256.get(file.sha256)
    if xet is None:
        return {}
    links = {
        "xet-auth": f"{state.url}/api/models/{name}/xet-read-token/{commit.oid}",
        "xet-reconstruction-info": f"{state.storage_url}/cas/v1/reconstructions/{xet.hash}",
    }
    return {"X-Xet-Hash": xet.hash, "Link": ", ".join(f'<{url}>; rel="{rel}"' for rel, url in links.items())}


def download(state: State, request: Request) -> Reply:
    """GET, HEAD /download/{repository}/{sha256}/{path} on the storage host."""
    name, sha256, path = request.groups
    request.exchange.file = f"{name}/{path}"
    state.require_signature(request, f"/download/{name}/{sha256}/{path}")
    return content(request, state.content_path(sha256), {"ETag": f'"{sha256}"'})


def content(request: Request, path: Path, headers: dict[str, str]) -> Reply:
    """A file's bytes, or the one range asked for."""
    size = path.stat().st_size
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    span = parse_range(request.range, size)
    if span is None:
        return Reply(200, Content(path, 0, size), headers)
    start, stop = span
    if start >= stop:
        return Reply(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return Reply(206, Content(path, start, stop), headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) of a Range header, empty if there are none such.

    None for no range, and for several: the whole file is then the answer, which HTTP allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def entry(
    state: State, repository: Repository, commit: Commit, path: str, file: File, expand: bool
) -> dict[str, object]:
    """How tree and paths-info describe a file."""
    described: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        described["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        if xet := state.xet.by_sha256.get(file.sha256):
            described["xetHash"] = xet.hash
    if expand:
        last = next(c for c in repository.history(commit.oid) if _brought(repository, c, path, file))
        described["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return described


def _brought(repository: Repository, commit: Commit, path: str, file: File) -> bool:
    """Whether the file came into being with this commit."""
    return commit.parent is None or repository.commits[commit.parent].files.get(path) != file
