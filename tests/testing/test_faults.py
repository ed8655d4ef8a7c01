"""Each misbehaviour, seen by a plain client: that it happens as said, where said, as often as said, and not after."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import get_args

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from streammerge.testing import Fault, Hub
from streammerge.testing.faults import Kind

WEIGHTS = Random(4).randbytes(3 << 20)
FILE = "/org/model/resolve/main/model.safetensors"
BYTES = "*/model.safetensors"


@pytest.fixture
def hub(folder: Callable[..., Path]) -> Iterator[Hub]:
    with Hub(redirects=False) as running:
        running.add("org/model", folder(model_safetensors=WEIGHTS, config_json=b"{}"))
        yield running


@pytest.fixture
def get(hub: Hub) -> Iterator[Callable[..., httpx2.Response]]:
    with httpx2.Client(base_url=hub.url, trust_env=False, timeout=10) as client:

        def call(path: str = FILE, range: str | None = None) -> httpx2.Response:
            return client.get(path, headers={"Range": range} if range else {})

        yield call


Get = Callable[..., httpx2.Response]


def raw(hub: Hub, path: str = FILE) -> tuple[bytes, bytes, str]:
    """Headers, body, and how the connection ended, of a GET with a bare socket."""
    host, _, port = hub.url.removeprefix("http://").partition(":")
    received, end = b"", "closed"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except ConnectionResetError:
            end = "reset"
    headers, _, body = received.partition(b"\r\n\r\n")
    return headers, body, end


def test_the_nth_requests_are_struck_and_no_others(hub: Hub, get: Get) -> None:
    armed = hub.misbehave(Fault("status", path=BYTES, method="GET", after=1, times=2, status=502))
    assert [get().status_code for _ in range(5)] == [200, 502, 502, 200, 200]
    assert get("/org/model/resolve/main/config.json").status_code == 200
    assert (armed.matched, armed.struck) == (5, 2)
    hub.misbehave(Fault("status", path="/api/models/*", times=None))
    assert [get("/api/models/org/model").status_code for _ in range(3)] == [503] * 3
    hub.behave()
    assert get("/api/models/org/model").status_code == 200


def test_body_faults_wait_for_a_body_and_range_faults_for_a_range(hub: Hub, get: Get) -> None:
    armed = [hub.misbehave(Fault("short_body", path=BYTES)), hub.misbehave(Fault("wrong_range", path=BYTES, after=1))]
    assert httpx2.head(f"{hub.url}{FILE}", trust_env=False).status_code == 200
    with pytest.raises(httpx2.RemoteProtocolError):
        get()
    assert [get(range="bytes=0-0").headers["Content-Range"][:9] for _ in range(2)] == ["bytes 0-0", "bytes 1-1"]
    assert [(one.matched, one.struck) for one in armed] == [(3, 1), (2, 1)]


def test_too_many_requests(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("rate_limit", path=BYTES, seconds=3))
    answer = get()
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
    assert get().content == WEIGHTS


def test_a_reset_after_some_bytes(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("reset", path=BYTES, nbytes=1 << 20, times=2))
    headers, body, end = raw(hub)
    assert (f"Content-Length: {len(WEIGHTS)}".encode() in headers, end) == (True, "reset")
    assert len(body) <= 1 << 20  # a reset may overtake bytes that are still on their way
    assert body == WEIGHTS[: len(body)]
    assert hub.record[-1].served == 1 << 20
    with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
        get(range="bytes=0-2000000")
    assert get(range="bytes=5-9").content == WEIGHTS[5:10]


def test_a_short_body(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("short_body", path=BYTES, nbytes=1_234_567, times=2))
    headers, body, end = raw(hub)
    assert (f"Content-Length: {len(WEIGHTS)}".encode() in headers, body, end) == (True, WEIGHTS[:1_234_567], "closed")
    with pytest.raises(httpx2.RemoteProtocolError):
        get()
    assert get().content == WEIGHTS


def test_ranges_ignored(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("ignore_range", path=BYTES))
    answer = get(range="bytes=10-19")
    assert (answer.status_code, "Content-Range" in answer.headers, answer.content) == (200, False, WEIGHTS)
    answer = get(range="bytes=10-19")
    assert (answer.status_code, answer.content) == (206, WEIGHTS[10:20])


def test_a_wrong_content_range(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("wrong_range", path=BYTES))
    answer = get(range="bytes=10-19")
    assert (answer.status_code, answer.content) == (206, WEIGHTS[10:20])
    assert answer.headers["Content-Range"] == f"bytes 11-20/{len(WEIGHTS)}"
    assert get(range="bytes=10-19").headers["Content-Range"] == f"bytes 10-19/{len(WEIGHTS)}"


@pytest.mark.parametrize("at", [0, 9, (1 << 20) + 5])
def test_a_wrong_byte(hub: Hub, get: Get, at: int) -> None:
    hub.misbehave(Fault("corrupt", path=BYTES, nbytes=at))
    content = get().content
    assert len(content) == len(WEIGHTS)
    assert [i for i, (a, b) in enumerate(zip(content, WEIGHTS, strict=True)) if a != b] == [at]


def test_a_slow_drip_and_a_stall(hub: Hub, get: Get) -> None:
    hub.misbehave(Fault("slow", path=BYTES, nbytes=10, seconds=0.05))
    start = time.monotonic()
    assert get(range="bytes=0-39").content == WEIGHTS[:40]
    assert time.monotonic() - start >= 0.15
    hub.misbehave(Fault("stall", path=BYTES, seconds=0.2))
    start = time.monotonic()
    assert get(range="bytes=0-39").content == WEIGHTS[:40]
    assert time.monotonic() - start >= 0.2


def test_leaving_does_not_wait_for_a_stall(folder: Callable[..., Path]) -> None:
    with Hub() as hub:
        hub.misbehave(Fault("stall", seconds=3600))
        connection = socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])))
        connection.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\n\r\n")
        while not hub.record:
            time.sleep(0.01)
        start = time.monotonic()
    connection.close()
    assert time.monotonic() - start < 10


def test_an_expired_url(hub: Hub, get: Get) -> None:
    hub.redirects = True
    hub.misbehave(Fault("expired", path="/download/*"))
    location = get().headers["Location"]
    answer = get(location)
    assert (answer.status_code, "expired" in answer.text) == (403, True)
    assert get(location).content == WEIGHTS


def test_a_branch_that_moves_between_two_requests(hub: Hub, get: Get) -> None:
    before = get("/api/models/org/model").json()["sha"]
    hub.misbehave(Fault("moved_branch", path=BYTES, files={"model.safetensors": b"other"}))
    assert get().content == b"other"
    after = get("/api/models/org/model").json()["sha"]
    assert after != before
    assert get(FILE.replace("main", before)).content == WEIGHTS
    assert [commit.author for commit in hub.repositories["org/model"].history()] == ["someone-else", "me"]


def commit(hub: Hub, head: str | None = None) -> str:
    api = HfApi(endpoint=hub.url, token="hf_x")
    operations = [CommitOperationAdd("config.json", b"[1]")]
    return api.create_commit("org/model", operations, commit_message="one", parent_commit=head).oid


@pytest.mark.parametrize(
    "fault", [Fault("conflict", path="*/commit/main"), Fault("moved_branch", path="*/commit/main")]
)
def test_a_commit_that_comes_too_late(hub: Hub, fault: Fault) -> None:
    head = hub.repositories["org/model"].branches["main"]
    armed = hub.misbehave(fault)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        commit(hub, head)
    assert (refused.value.response.status_code, armed.struck) == (412, 1)
    assert hub.read("org/model", "config.json") == b"{}"
    made = commit(hub, hub.repositories["org/model"].branches["main"])
    assert (hub.repositories["org/model"].branches["main"], hub.read("org/model", "config.json")) == (made, b"[1]")


def test_objects_that_are_lost_before_the_commit(hub: Hub) -> None:
    committed = hub.files("org/model")["model.safetensors"].sha256
    content = b"uploaded and not committed"
    with httpx2.Client(trust_env=False) as client:
        client.put(hub.sign(f"/upload/org/model/{hashlib.sha256(content).hexdigest()}"), content=content)
    assert len(hub.repositories["org/model"].objects) == 2
    hub.misbehave(Fault("lost_objects", path="*/commit/main"))
    commit(hub)
    assert hub.repositories["org/model"].objects == {committed}


def test_a_reply_that_is_lost_after_the_commit_was_made(hub: Hub) -> None:
    hub.misbehave(Fault("lost_reply", path="*/commit/main"))
    with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
        commit(hub)
    assert hub.read("org/model", "config.json") == b"[1]"
    assert len(list(hub.repositories["org/model"].history())) == 2


def test_a_reset_in_the_middle_of_an_upload(hub: Hub) -> None:
    oid, content = hashlib.sha256(WEIGHTS[:-1]).hexdigest(), WEIGHTS[:-1]
    url = hub.sign(f"/upload/org/model/{oid}")
    hub.misbehave(Fault("reset_upload", path="/upload/*", nbytes=2 << 20))
    with httpx2.Client(trust_env=False) as client:
        with pytest.raises(httpx2.TransportError):
            client.put(url, content=content)
        assert 2 << 20 <= hub.record[-1].received <= len(content)
        assert oid not in hub.repositories["org/model"].objects
        assert client.put(url, content=content[:-1]).status_code == 400
        assert client.put(url, content=iter([content[:9], content[9:]])).status_code == 200  # chunked
    assert oid in hub.repositories["org/model"].objects
    assert [path.name for path in (hub.folder / "blobs").iterdir() if path.name.startswith("partial")] == []


def test_a_refusal_leaves_the_connection_in_order(hub: Hub) -> None:
    hub.misbehave(Fault("status", path="/upload/*", status=500))
    url = hub.sign(f"/upload/org/model/{'0' * 64}")
    with httpx2.Client(trust_env=False) as client:
        assert client.put(url, content=WEIGHTS).status_code == 500
        assert client.get(hub.sign("/download/org/model/" + hub.files("org/model")["model.safetensors"].sha256 + "/x"))
    assert hub.record[0].received == len(WEIGHTS)


def test_every_kind_has_a_test_and_no_other_is_taken() -> None:
    words = Path(__file__).read_text()
    assert [kind for kind in get_args(Kind) if f'Fault("{kind}"' not in words] == []
    with pytest.raises(ValueError, match=r"no fault is called 'ratelimit'; there are: status, rate_limit"):
        Fault("ratelimit")
