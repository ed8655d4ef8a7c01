"""Routes about discussions and pull requests."""

import hashlib
from typing import Any

from streammerge.testing.repository import Discussion, Repository
from streammerge.testing.state import State, require_writer
from streammerge.testing.wire import RefusalError, Reply, Request, json_reply

PAGE_SIZE = 50


def create(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/discussions; with `pullRequest`, a draft pull request on main."""
    repository = state.writable(request, request.groups[0], by_pull_request=True)
    asked = request.json()
    author = require_writer(request).name
    base = "main" if asked.get("pullRequest") else None
    discussion = repository.discuss(asked["title"], asked.get("description", ""), author, base)
    return json_reply({"num": discussion.num, "url": f"{state.url}/{repository.id}/discussions/{discussion.num}"})


def listing(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/discussions[?p=page]."""
    repository = state.readable(request, request.groups[0])
    start = int(request.query.get("p", 0)) * PAGE_SIZE
    page = sorted(repository.discussions.values(), key=lambda d: -d.num)[start : start + PAGE_SIZE]
    described = [_describe(repository, discussion) for discussion in page]
    return json_reply({"discussions": described, "count": len(repository.discussions), "start": start})


def details(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/discussions/{num}."""
    repository, discussion = _find(state, request)
    described = _describe(repository, discussion) | {"events": _events(repository, discussion)}
    if discussion.is_pull_request:
        changes = {"base": f"refs/heads/{discussion.base}", "mergeCommitId": discussion.merge_commit}
        described |= {"changes": changes, "filesWithConflicts": [], "diff": ""}
    return json_reply(described)


def merge(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/discussions/{num}/merge."""
    state.writable(request, request.groups[0])
    repository, discussion = _find(state, request)
    if not discussion.is_pull_request or discussion.status not in ("draft", "open"):
        raise RefusalError(400, f"discussion {discussion.num} is no open pull request")
    repository.merge(discussion, require_writer(request).name)
    return json_reply({"success": True})


def status(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/discussions/{num}/status: open or closed."""
    state.writable(request, request.groups[0])
    _, discussion = _find(state, request)
    discussion.status = request.json()["status"]
    return json_reply({"newStatus": _event(discussion, "status-change", {"status": discussion.status})})


def _find(state: State, request: Request) -> tuple[Repository, Discussion]:
    name, num = request.groups
    repository = state.readable(request, name)
    if int(num) not in repository.discussions:
        raise RefusalError(404, f"there is no discussion {num}", "EntryNotFound")
    return repository, repository.discussions[int(num)]


def _describe(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "status": discussion.status,
        "createdAt": discussion.created,
        "isPullRequest": discussion.is_pull_request,
        "repo": {"name": repository.id, "type": "model"},
    }


def _events(repository: Repository, discussion: Discussion) -> list[dict[str, Any]]:
    """The opening words, then for a pull request each commit on it, oldest first."""
    said = {"edited": False, "hidden": False, "latest": {"raw": discussion.description}}
    events = [_event(discussion, "comment", said)]
    if discussion.is_pull_request:
        own = []
        for commit in repository.history(discussion.ref):
            if commit.oid == discussion.fork:
                break
            own.append(_event(discussion, "commit", {"subject": commit.title, "oid": commit.oid}))
        events += reversed(own)
    return events


def _event(discussion: Discussion, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    id = hashlib.sha1(f"{discussion.num} {kind} {data}".encode()).hexdigest()[:24]
    author = {"name": discussion.author}
    return {"id": id, "type": kind, "createdAt": discussion.created, "author": author, "data": data}
