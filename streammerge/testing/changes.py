"""Routes that change repositories: creation, settings, branches, tags, preupload, commit."""

import base64
import json
from typing import Any

from streammerge.branches import branch_flaw
from streammerge.testing.repository import Discussion, Repository
from streammerge.testing.state import State, require_writer
from streammerge.testing.store import GITATTRIBUTES, LFS_BYTES, File, is_lfs, lfs_file
from streammerge.testing.wire import RefusalError, Reply, Request, json_reply

CONFLICT = "A commit has happened since. Please refresh and try again."
MISSING = "Your push was rejected because an LFS pointer pointed to a file that does not exist."


def create_repository(state: State, request: Request) -> Reply:
    """POST /api/repos/create: a repository with one commit, that of its .gitattributes."""
    user = require_writer(request)
    asked = request.json()
    if asked.get("type", "model") not in (None, "model"):
        raise RefusalError(400, "this Hub keeps models only")
    namespace = asked.get("organization") or user.name
    name = f"{namespace}/{asked['name']}"
    if not user.belongs_to(namespace):
        raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{state.url}/{name}"
    if name in state.repositories:
        raise RefusalError(409, "You already created this model repo", url=url)
    private = asked.get("visibility") == "private" or asked.get("private") is True
    repository = state.repositories[name] = Repository(name, private=private)
    attributes = state.blobs.add_file(".gitattributes", [GITATTRIBUTES])
    repository.commit("main", {".gitattributes": attributes}, "initial commit", author=user.name)
    return json_reply({"url": url, "name": name, "private": private})


def delete_repository(state: State, request: Request) -> Reply:
    """DELETE /api/repos/delete."""
    asked = request.json()
    name = f"{asked.get('organization') or require_writer(request).name}/{asked['name']}"
    state.writable(request, name)
    del state.repositories[name]
    return Reply()


def settings(state: State, request: Request) -> Reply:
    """PUT /api/models/{repository}/settings: visibility, gate."""
    repository = state.writable(request, request.groups[0])
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
    repository.gated = bool(asked.get("gated", repository.gated))
    return json_reply(asked)


def create_branch(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/branch/{branch}."""
    name, branch = request.groups
    repository = state.writable(request, name)
    if flaw := branch_flaw(branch):
        raise RefusalError(400, f"Invalid reference name: {flaw}")
    if branch in repository.branches:
        raise RefusalError(409, f"Reference already exists: refs/heads/{branch}")
    start = request.json().get("startingPoint", "main")
    repository.branches[branch] = state.commit_of(repository, start).oid
    return json_reply({"success": True})


def delete_branch(state: State, request: Request) -> Reply:
    """DELETE /api/models/{repository}/branch/{branch}."""
    return _delete_ref(state, request, "branches")


def create_tag(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/tag/{revision}."""
    name, revision = request.groups
    repository = state.writable(request, name)
    tag = request.json()["tag"]
    if tag in repository.tags:
        raise RefusalError(409, f"Tag reference exists already: refs/tags/{tag}")
    repository.tags[tag] = state.commit_of(repository, revision).oid
    return json_reply({"success": True})


def delete_tag(state: State, request: Request) -> Reply:
    """DELETE /api/models/{repository}/tag/{tag}."""
    return _delete_ref(state, request, "tags")


def _delete_ref(state: State, request: Request, kind: str) -> Reply:
    name, ref = request.groups
    named = getattr(state.writable(request, name), kind)
    if named.pop(ref, None) is None:
        raise RefusalError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return Reply()


def auth_check(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/auth-check[/write]."""
    name, write = request.groups
    repository = state.writable(request, name) if write else state.readable(request, name)
    state.require_access(request, repository)
    return json_reply({"success": True})


def validate_yaml(state: State, request: Request) -> Reply:
    """POST /api/validate-yaml: the metadata block must be there and closed; what it says is not looked at."""
    content = request.json()["content"]
    lines = content.splitlines()
    if not lines or lines[0].strip() != "---":
        return json_reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    if "---" not in [line.strip() for line in lines[1:]]:
        return json_reply(
            {"errors": [{"message": "the metadata block is not closed by ---"}], "warnings": []}, status=400
        )
    return json_reply({"errors": [], "warnings": []})


def preupload(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/preupload/{revision}: LFS or not, and what is there under the same path."""
    name, revision = request.groups
    by_pull_request = request.query.get("create_pr") == "1"
    repository = state.writable(request, name, by_pull_request)
    there = state.commit_of(repository, revision).files
    modes = []
    for asked in request.json()["files"]:
        path = asked["path"]
        mode = "lfs" if is_lfs(path, asked["size"]) else "regular"
        described = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        modes.append(described | ({"oid": there[path].etag} if path in there else {}))
    return json_reply({"files": modes})


def commit(state: State, request: Request) -> Reply:
    """POST /api/models/{repository}/commit/{revision}[?create_pr=1]: one atomic change of a branch or pull request."""
    name, revision = request.groups
    by_pull_request = request.query.get("create_pr") == "1"
    repository = state.writable(request, name, by_pull_request)
    author = require_writer(request).name
    head = state.commit_of(repository, revision)
    if revision not in repository.branches and revision not in repository.pulls:
        raise RefusalError(400, f"{revision} is neither a branch nor a pull request: nothing can be committed to it")
    operations = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    header = next(o["value"] for o in operations if o["key"] == "header")
    if header.get("parentCommit") not in (None, head.oid):
        raise RefusalError(412, CONFLICT)
    files = dict(head.files)
    for operation in operations:
        if operation["key"] != "header":
            _apply(state, repository, files, operation["key"], operation["value"])
    title, description = header["summary"], header.get("description", "")
    pull: Discussion | None = None
    if by_pull_request:
        pull = repository.discuss(title, description, author, revision)
        pull.status, revision = "open", pull.ref
    made = repository.commit(revision, files, title, description, author)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{state.url}/{name}/commit/{made.oid}"}
    if pull is not None:
        answer["pullRequestUrl"] = f"{state.url}/{name}/discussions/{pull.num}"
    return json_reply(answer)


def _apply(state: State, repository: Repository, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """One line of a commit."""
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        if len(content) > LFS_BYTES:
            raise RefusalError(400, f"Your push was rejected because it contains files larger than 10 MB: {path}")
        files[path] = state.blobs.add_file(path, [content])
    elif key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise RefusalError(400, f"{MISSING} Offending file: {path}")
        files[path] = lfs_file(value["oid"], state.object_size(value["oid"]))
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [other for other in files if other.startswith(f"{path.rstrip('/')}/")]
        if not inside:
            raise RefusalError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for other in inside:
            del files[other]
    else:
        raise RefusalError(400, f"no operation is called {key}")
