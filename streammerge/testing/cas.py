"""Routes of Xet storage: a token from the Hub, then xorbs and shards to and from the storage host.

Nothing is deduplicated between clients. That a xorb is what its hash says is not checked (BLAKE3 is not in the
standard library); a file's SHA-256 is, when its bytes are first asked for without Xet.
"""

import time
from typing import Any

from streammerge.testing.files import content, parse_range
from streammerge.testing.state import State
from streammerge.testing.wire import RefusalError, Reply, Request, json_reply
from streammerge.testing.xet import Term, read_shard

TOKEN_SECONDS = 3600


def read_token(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/xet-read-token/{revision}."""
    name, revision = request.groups
    repository = state.readable(request, name)
    state.commit_of(repository, revision)
    state.require_access(request, repository)
    return _token(state, name, "read")


def write_token(state: State, request: Request) -> Reply:
    """GET /api/models/{repository}/xet-write-token/{revision}[?create_pr=1]; without a revision's name, "None"."""
    name, _ = request.groups
    state.writable(request, name, by_pull_request=request.query.get("create_pr") == "1")
    return _token(state, name, "write")


def _token(state: State, name: str, scope: str) -> Reply:
    expires = int(time.time()) + TOKEN_SECONDS
    token = state.xet_token(name, scope)
    answer = {"casUrl": f"{state.storage_url}/cas", "exp": expires, "accessToken": token}
    headers = {"X-Xet-Cas-Url": f"{state.storage_url}/cas", "X-Xet-Token-Expiration": str(expires)}
    return json_reply(answer, headers | {"X-Xet-Access-Token": token})


def put_xorb(state: State, request: Request) -> Reply:
    """POST /cas/v1/xorbs/default/{hash}."""
    (xorb,) = request.groups
    name = state.require_xet_token(request, "write")
    request.exchange.file = f"{name}/{xorb}"
    try:
        new = state.xet.add_xorb(xorb, request.chunks())
    except ValueError as error:
        raise RefusalError(400, f"{xorb}: {error}") from None
    return json_reply({"was_inserted": new})


def put_shard(state: State, request: Request) -> Reply:
    """POST /cas/v1/shards, /cas/v2/shards: the files it describes are now objects of the token's repository."""
    name = state.require_xet_token(request, "write")
    try:
        for file in read_shard(request.body()):
            state.xet.add_file(file)
            state.repositories[name].objects.add(file.sha256)
    except ValueError as error:
        raise RefusalError(400, str(error)) from None
    return json_reply({"type": "result", "result": 1})  # version 2 wants a type in each line, version 1 has none


def reconstruction(state: State, request: Request) -> Reply:
    """GET /cas/v1/reconstructions/{hash}: the terms of a file or of a range of it, and where to fetch their chunks."""
    (hash,) = request.groups
    name = state.require_xet_token(request, "read")
    file = state.xet.by_hash.get(hash)
    if file is None or file.sha256 not in state.repositories[name].objects:
        raise RefusalError(404, f"there is no file {hash}")
    span = parse_range(request.range, file.size) or (0, file.size)
    if file.size and span[0] >= span[1]:
        return Reply(416, headers={"Content-Range": f"bytes */{file.size}"})
    terms, skipped = state.xet.part(file, *span)
    fetch_info: dict[str, list[dict[str, Any]]] = {}
    for term in terms:
        fetch_info.setdefault(term.xorb, []).append(_fetch_info(state, term))
    listed = [{"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.stop}} for t in terms]
    return json_reply({"offset_into_first_range": skipped, "terms": listed, "fetch_info": fetch_info})


def _fetch_info(state: State, term: Term) -> dict[str, Any]:
    chunks = state.xet.chunks(term)
    return {
        "range": {"start": term.start, "end": term.stop},
        "url": state.sign(f"/xorbs/{term.xorb}"),
        "url_range": {"start": chunks[0].start, "end": chunks[-1].stop - 1},
    }


def absent(state: State, request: Request) -> Reply:
    """What a client asks for and does without: deduplication, upload grants, version 2 of reconstructions."""
    raise RefusalError(404, "this storage has no such thing")


def get_xorb(state: State, request: Request) -> Reply:
    """GET /xorbs/{hash} on the storage host."""
    (xorb,) = request.groups
    state.require_signature(request, f"/xorbs/{xorb}")
    path = state.xet.path(xorb)
    return content(request, path, {"ETag": f'"{xorb}"'})
