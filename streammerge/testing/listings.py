"""Routes that tell what there is: model info, file tree, paths-info, refs, commits, whoami."""

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlencode

from streammerge.testing.files import entry
from streammerge.testing.repository import Commit, Repository
from streammerge.testing.state import State
from streammerge.testing.store import File
from streammerge.testing.wire import RefusalError, Reply, Request, json_reply

EXPANDED_PAGE_SIZE = 50


def agent_harnesses(state: State, request: Request) -> Reply:
    """GET /api/agent-harnesses: the client asks for it once, and does without."""
    return json_reply({"standardEnvVars": [], "harnesses": {}})


def whoami(state: State, request: Request) -> Reply:
    """GET /api/whoami-v2."""
    user = request.user
    if user is None:
        raise RefusalError(401, "Invalid username or password.")
    listed = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(user.organizations or ())]
    organizations = {} if user.organizations is None else {"orgs": listed}  # who may use all has no list of them
    token = {"displayName": "token", "role": "write" if user.can_write else "read"}
    return json_reply(
        {
            "type": "user",
            "id": hashlib.sha1(user.name.encode()).hexdigest()[:24],
            "name": user.name,
            "fullname": user.name,
            "isPro": False,
            **organizations,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def info(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}[/revision/{revision}][?blobs=true]."""
    name, revision = request.groups
    repository = state.readable(request, name)
    commit = state.commit_of(repository, revision or "main")
    with_blobs = request.query.get("blobs", "").lower() in ("true", "1")
    files = sorted(commit.files.items())
    return json_reply(
        {
            "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit.oid,
            "createdAt": repository.created,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [_sibling(path, file, with_blobs) for path, file in files],
        }
    )


def _sibling(path: str, file: File, with_blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_blobs:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def tree(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/tree/{revision}[/{path}], a page at a time."""
    name, revision, folder = request.groups
    repository = state.readable(request, name)
    commit = state.commit_of(repository, revision)
    recursive, expand = (request.query.get(key, "").lower() in ("true", "1") for key in ("recursive", "expand"))
    entries = _entries(state, repository, commit, (folder or "").strip("/"), recursive, expand)
    if folder and not entries:
        raise RefusalError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    size = min(state.page_size, EXPANDED_PAGE_SIZE) if expand else state.page_size
    return paged(request, entries, min(size, int(request.query.get("limit", size))))


def _entries(
    state: State, repository: Repository, commit: Commit, folder: str, recursive: bool, expand: bool
) -> list[dict[str, Any]]:
    """The files and folders in a folder, in the order of their paths."""
    prefix = f"{folder}/" if folder else ""
    described: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            parent = prefix + "/".join(parts[:depth])
            described[parent] = {"type": "directory", "oid": _tree_oid(commit, parent), "size": 0, "path": parent}
        if recursive or len(parts) == 1:
            described[path] = entry(state, repository, commit, path, file, expand)
    return [described[path] for path in sorted(described)]


def _tree_oid(commit: Commit, folder: str) -> str:
    """An id that changes with the folder's content, as git's does."""
    inside = sorted((path, file.oid) for path, file in commit.files.items() if path.startswith(f"{folder}/"))
    return hashlib.sha1(json.dumps(inside).encode()).hexdigest()


def paged(request: Request, entries: list[dict[str, Any]], size: int) -> Reply:
    """One page of a list, and in the Link header where the next one is."""
    start = int(request.query.get("cursor", 0))
    headers = {}
    if start + size < len(entries):
        query = urlencode({**request.query, "cursor": start + size})
        headers["Link"] = f'<{request.base_url}{request.raw_path}?{query}>; rel="next"'
    return json_reply(entries[start : start + size], headers)


def paths_info(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/paths-info/{revision}: what exists of the paths asked for."""
    name, revision = request.groups
    repository = state.readable(request, name)
    commit = state.commit_of(repository, revision)
    body = request.body().decode()
    if "json" in (request.headers.get("Content-Type") or ""):
        asked, expand = json.loads(body)["paths"], bool(json.loads(body).get("expand"))
    else:
        form = parse_qs(body)
        asked, expand = form.get("paths", []), form.get("expand", [""])[0].lower() in ("true", "1")
    found = []
    for path in asked:
        if path in commit.files:
            found.append(entry(state, repository, commit, path, commit.files[path], expand))
        elif any(other.startswith(f"{path.rstrip('/')}/") for other in commit.files):
            found.append({"type": "directory", "oid": _tree_oid(commit, path), "size": 0, "path": path})
    return json_reply(found)


def refs(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/refs[?include_prs=1]."""
    repository = state.readable(request, request.groups[0])
    named = {
        "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in repository.branches.items()],
        "converts": [],
        "tags": [_ref(name, f"refs/tags/{name}", oid) for name, oid in repository.tags.items()],
    }
    if request.query.get("include_prs"):
        named["pullRequests"] = [_ref(ref.rpartition("/")[2], ref, oid) for ref, oid in repository.pulls.items()]
    return json_reply(named)


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


def commits(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/commits/{revision}: newest first, a page at a time."""
    name, revision = request.groups
    repository = state.readable(request, name)
    newest = state.commit_of(repository, revision)
    listed = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repository.history(newest.oid)
    ]
    return paged(request, listed, EXPANDED_PAGE_SIZE)
