"""Routes that bring an LFS object to the Hub: batch, basic and multipart upload, verify."""

import hashlib
from collections.abc import Iterator
from math import ceil

from streammerge.testing.state import State
from streammerge.testing.store import WrongContentError, read_chunks
from streammerge.testing.wire import RefusalError, Reply, Request, json_reply


def batch(state: State, request: Request) -> Reply:
    """POST /{repository}.git/info/lfs/objects/batch: where to put each object; no actions for one that is there."""
    (name,) = request.groups
    repository = state.writable(request, name, by_pull_request=True)
    asked = request.json()
    if asked.get("operation") != "upload":
        raise RefusalError(422, "only uploads go through this endpoint")
    multipart = "multipart" in asked.get("transfers", ())
    objects = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        described = {"oid": oid, "size": size}
        if oid not in repository.objects:
            described["actions"] = {
                "upload": _upload_action(state, name, oid, size, multipart),
                "verify": {"href": f"{state.url}/api/complete/{name}/verify"},
            }
        objects.append(described)
    chosen = "multipart" if any("header" in _upload(o) for o in objects) else "basic"
    return json_reply({"transfer": chosen, "objects": objects})


def _upload(described: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    return described.get("actions", {}).get("upload", {})


def _upload_action(state: State, name: str, oid: str, size: int, multipart: bool) -> dict[str, object]:
    if not multipart or size <= state.part_bytes:
        return {"href": state.sign(f"/upload/{name}/{oid}")}
    parts = range(1, ceil(size / state.part_bytes) + 1)
    header = {str(number): state.sign(f"/upload/{name}/{oid}/{number}") for number in parts}
    return {"href": f"{state.url}/api/complete/{name}", "header": {"chunk_size": str(state.part_bytes), **header}}


def put_object(state: State, request: Request) -> Reply:
    """PUT /upload/{repository}/{oid} on the storage host."""
    name, oid = request.groups
    request.exchange.file = f"{name}/{oid}"
    state.require_signature(request, f"/upload/{name}/{oid}")
    _store(state, name, oid, request.chunks())
    return Reply(200, headers={"ETag": f'"{oid}"'})


def put_part(state: State, request: Request) -> Reply:
    """PUT /upload/{repository}/{oid}/{number} on the storage host."""
    name, oid, number = request.groups
    request.exchange.file = f"{name}/{oid}"
    state.require_signature(request, f"/upload/{name}/{oid}/{number}")
    folder = state.folder / "parts" / oid
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5()
    with (folder / f"{number}.{id(request)}").open("wb") as part:
        for chunk in request.chunks():
            digest.update(chunk)
            part.write(chunk)
    (folder / f"{number}.{id(request)}").replace(folder / number)
    return Reply(200, headers={"ETag": f'"{digest.hexdigest()}"'})


def complete(state: State, request: Request) -> Reply:
    """POST /api/complete/{repository}: a multipart upload's parts become the object."""
    (name,) = request.groups
    asked = request.json()
    oid = asked["oid"]
    folder = state.folder / "parts" / oid
    paths = [folder / str(part["partNumber"]) for part in asked["parts"]]
    for part, path in zip(asked["parts"], paths, strict=True):
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in read_chunks(path) if path.exists() else ():
            digest.update(chunk)
        if part["etag"].strip('"') != digest.hexdigest():
            raise RefusalError(400, f"InvalidPart: part {part['partNumber']} of {oid}")
    _store(state, name, oid, (chunk for path in paths for chunk in read_chunks(path)))
    for path in paths:
        path.unlink()
    return json_reply({"success": True})


def verify(state: State, request: Request) -> Reply:
    """POST /api/complete/{repository}/verify: whether an object has arrived."""
    (name,) = request.groups
    repository = state.writable(request, name, by_pull_request=True)
    asked = request.json()
    oid, size = asked["oid"], asked["size"]
    if oid not in repository.objects or state.object_size(oid) != size:
        raise RefusalError(404, f"object {oid} of {size} bytes has not been uploaded")
    return json_reply({"success": True})


def _store(state: State, name: str, oid: str, chunks: Iterator[bytes]) -> None:
    try:
        state.blobs.add(chunks, oid)
    except WrongContentError as error:
        raise RefusalError(400, f"BadDigest: {error}") from None
    state.repositories[name].objects.add(oid)
