"""Xet: the real client with hf_xet, in processes of its own; and the formats, against examples made by hand."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch

from streammerge.testing import Fault, Hub
from streammerge.testing.xet import Chunk, hash_text, read_chunk_index, read_shard, unpack_chunk

CONTENT = b"".join(
    [
        torch.randint(256, (300_000,), generator=torch.manual_seed(1), dtype=torch.uint8).numpy().tobytes(),
        bytes(200_000),
        b"abcabcabcx" * 20_000,
    ]
)  # chunks stored as they are, and packed
FLOATS = torch.randn(200_001, generator=torch.manual_seed(2)).numpy().tobytes() + b"xy"  # grouped by four, and packed
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Runs lines of Python with `api`; returns what they print as JSON."""
    (tmp_path / "content").write_bytes(CONTENT)
    (tmp_path / "floats").write_bytes(FLOATS)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}

    def run(lines: str, *options: str, home: str = "home") -> dict[str, object]:
        environment = kept | hub.environment() | {"HF_HOME": str(tmp_path / home), "HF_TOKEN": "hf_x"}
        code = f"import json\nfrom huggingface_hub import *\napi = HfApi()\n{lines}"
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout or "{}")

    return run


UPLOAD = """
import sys
options = {"create_pr": True} if "--pr" in sys.argv else {}
api.create_repo("org/model", exist_ok=True)
operations = [CommitOperationAdd("model.safetensors", "content"), CommitOperationAdd("floats.safetensors", "floats")]
for operation in operations:
    api.preupload_lfs_files("org/model", [operation], **options)
"""
COMMIT = """
operations.append(CommitOperationAdd("config.json", b"{}"))
try:
    print(json.dumps({"oid": api.create_commit("org/model", operations, commit_message="all", **options).oid}))
except Exception as error:
    print(json.dumps({"refused": str(error)}))
"""
DOWNLOAD = """
import hashlib, sys
from huggingface_hub.utils._xet import get_xet_session
from hf_xet import XetFileInfo

path = hf_hub_download("org/model", "model.safetensors")
whole = open(path, "rb").read()
floats = open(hf_hub_download("org/model", "floats.safetensors"), "rb").read()
file = api.get_paths_info("org/model", "model.safetensors")[0]
group = get_xet_session().new_download_stream_group(
    token_refresh_url=f"{api.endpoint}/api/models/org/model/xet-read-token/{api.model_info('org/model').sha}",
    token_refresh_headers=api._build_hf_headers(),
)
info = XetFileInfo(file.xet_hash, file.size)
parts = {}
for start, end in ((0, 10), (299_999, 500_003), (123_456, 123_457), (600_000, file.size)):
    part = b"".join(group.download_stream(info, start=start, end=end))
    parts[f"{start}-{end}"] = hashlib.sha256(part).hexdigest()
whole, floats = (hashlib.sha256(content).hexdigest() for content in (whole, floats))
print(json.dumps({"sha256": whole, "parts": parts, "hash": file.xet_hash, "floats": floats}))
"""


def test_up_and_down(hub: Hub, client: Callable[..., dict[str, object]]) -> None:
    client(UPLOAD + COMMIT)
    done = hub.traffic()
    assert "upload" not in done and "lfs-batch" not in done
    assert 500_000 < done["xorb-upload"].received < len(CONTENT + FLOATS)
    kinds = {xorb.read_bytes()[chunk.start + 4] for xorb, chunk in stored_chunks(hub)}
    assert kinds == {0, 1, 2}  # stored, LZ4, grouped and LZ4
    file = hub.files("org/model")["model.safetensors"]
    assert (file.sha256, file.size, file.lfs) == (SHA256, len(CONTENT), True)

    # three readers of the same chunks: the client, whole and in parts; this Hub, for clients without Xet
    found = client(DOWNLOAD, home="another")
    assert (found["sha256"], found["floats"]) == (SHA256, hashlib.sha256(FLOATS).hexdigest())
    spans = [name.split("-") for name in found["parts"]]
    assert found["parts"] == {f"{a}-{b}": hashlib.sha256(CONTENT[int(a) : int(b)]).hexdigest() for a, b in spans}
    assert "download" not in hub.traffic()
    assert (hub.read("org/model", "model.safetensors"), hub.read("org/model", "floats.safetensors")) == (
        CONTENT,
        FLOATS,
    )
    with httpx2.Client(follow_redirects=True, trust_env=False) as plain:
        url = f"{hub.url}/org/model/resolve/main/model.safetensors"
        answer = plain.get(url, headers={"Range": "bytes=299990-300009"})
        head = plain.head(url, follow_redirects=False)
    assert (answer.status_code, answer.content) == (206, CONTENT[299990:300010])
    assert head.headers["X-Xet-Hash"] == found["hash"]
    assert {e.status for e in hub.record if e.endpoint == "reconstruction" and "/v1/" in e.path} == {200}
    assert {e.authorization for e in hub.record if e.endpoint.startswith("xorb-down")} == {None}


def stored_chunks(hub: Hub) -> Iterator[tuple[Path, Chunk]]:
    for xorb in hub.xet.folder.iterdir():
        if xorb.is_file():
            yield from ((xorb, chunk) for chunk in read_chunk_index(xorb))


def test_a_second_upload_sends_nothing_new(hub: Hub, client: Callable[..., dict[str, object]]) -> None:
    client(UPLOAD)
    sent = hub.traffic()["xorb-upload"].received
    client(UPLOAD + COMMIT)
    assert hub.traffic()["xorb-upload"].received == sent
    assert hub.read("org/model", "model.safetensors") == CONTENT


def test_a_lost_object_and_a_pull_request(hub: Hub, client: Callable[..., dict[str, object]]) -> None:
    hub.misbehave(Fault("lost_objects", path="*/commit/main"))
    said = client(UPLOAD + COMMIT)
    assert "LFS pointer pointed to a file that does not exist" in str(said["refused"])
    assert list(hub.files("org/model")) == [".gitattributes"]
    client(UPLOAD + COMMIT, "--pr")
    assert hub.read("org/model", "model.safetensors", "refs/pr/1") == CONTENT
    assert list(hub.files("org/model")) == [".gitattributes"]
    assert [e.query for e in hub.record if e.endpoint == "xet-token"] == ["", "", "create_pr=1", "create_pr=1"]


def test_xet_uploads_meet_faults_too(hub: Hub, client: Callable[..., dict[str, object]]) -> None:
    armed = hub.misbehave(Fault("reset_upload", path="/cas/v1/xorbs/*", nbytes=1000))
    client(UPLOAD + COMMIT)
    assert armed.struck == 1
    assert hub.read("org/model", "model.safetensors") == CONTENT


def test_storage_needs_its_own_token(hub: Hub) -> None:
    with httpx2.Client(base_url=hub.storage_url, trust_env=False, headers={"Authorization": "Bearer hf_x"}) as plain:
        assert plain.get(f"/cas/v1/reconstructions/{'0' * 64}").status_code == 401
        assert plain.post("/cas/v1/shards", content=b"").status_code == 401
        assert plain.get(f"/xorbs/{'0' * 64}").status_code == 403


def test_hashes_are_four_little_endian_numbers() -> None:
    # the example of https://huggingface.co/docs/xet/api
    text = "07060504030201000f0e0d0c0b0a0908171615141312111" + "01f1e1d1c1b1a1918"
    assert hash_text(bytes(range(32))) == text


def chunk(scheme: int, packed: bytes, size: int) -> bytes:
    return b"\0" + len(packed).to_bytes(3, "little") + bytes([scheme]) + size.to_bytes(3, "little") + packed


def frame(*blocks: bytes) -> bytes:
    """An LZ4 frame without sizes and checksums; the header's own check byte is not looked at."""
    sized = b"".join(len(block).to_bytes(4, "little") + block for block in blocks)
    return bytes.fromhex("04224d18 40 40 c0") + sized + bytes(4)


def test_chunks_are_unpacked() -> None:
    assert unpack_chunk(chunk(0, b"plain", 5)) == b"plain"
    # 3 literals, then 4+3 bytes from 3 back, which overlap with themselves; then 1 literal, and the end
    block = bytes([0x33]) + b"abc" + bytes([3, 0]) + bytes([0x10]) + b"X"
    assert unpack_chunk(chunk(1, frame(block), 11)) == b"abcabcabcaX"
    # lengths of 15 and more go on: 15 + 255 + 2 literals; a copy of 4 + 15 + 0 bytes from 272 back
    literals = bytes(range(256)) + b"0123456789abcdef"
    block = bytes([0xFF, 255, 2]) + literals + (272).to_bytes(2, "little") + bytes([0, 0x00])
    assert unpack_chunk(chunk(1, frame(block), 291)) == literals + literals[:19]
    # a second block may copy from the first, and a stored one has its size's highest bit set
    again = bytes([0x00]) + (3).to_bytes(2, "little") + bytes([0x00])
    assert unpack_chunk(chunk(1, frame(bytes([0x30]) + b"xyz", again), 7)) == b"xyzxyzx"
    stored = bytes.fromhex("04224d18 40 40 c0") + (0x80000002).to_bytes(4, "little") + b"hi" + bytes(4)
    assert unpack_chunk(chunk(1, stored, 2)) == b"hi"
    # bytes 0, 4, 8 came first, then 1, 5, 9 and so on
    assert unpack_chunk(chunk(2, frame(bytes([0xA0]) + b"0481592637"), 10)) == b"0123456789"


def test_what_is_no_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="not a shard"):
        list(read_shard(bytes(200)))
