"""Byte ranges of a file on the Hub: the right bytes whatever the server does, or one line that says what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from streammerge.checkpoints.source import coalesce
from streammerge.errors import CheckpointError, HeaderError, TransferError
from streammerge.hub import ranges, tries
from streammerge.hub.ranges import Lanes, RangeFile
from streammerge.hub.remote import Remote, Tally
from streammerge.testing import Fault, Hub

NAME = "model.safetensors"
WHERE = f"model org/m, file {NAME}"
BYTES = f"/download/org/m/*/{NAME}"  # where the storage serves it
SIZE = 3 << 20
Open = Callable[..., RangeFile]


@pytest.fixture(autouse=True)
def _settings(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "LEAST_PIECE", 1 << 18)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file({"x": np.random.default_rng(5).integers(0, 256, SIZE, dtype=np.uint8)}, folder / NAME)
    return folder


@pytest.fixture
def content(hub: Hub, weights: Path) -> bytes:
    """Of org/m's only file."""
    hub.add("org/m", weights)
    return (weights / NAME).read_bytes()


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def opened(hub: Hub, content: bytes, tally: Tally) -> Iterator[Open]:
    lanes = Lanes()

    def call(guess: int = 0, name: str = NAME) -> RangeFile:
        remote = Remote(f"{hub.url}/org/m/resolve/main/{name}", "model org/m", f"model org/m, file {name}", tally)
        return RangeFile(remote, lanes, guess)

    yield call
    lanes.close()


def read(source: RangeFile, start: int, stop: int) -> bytes:
    buffer = bytearray(b"\x07" * (stop - start))
    source.read_into(memoryview(buffer), start)
    return bytes(buffer)


def spans(hub: Hub, endpoint: str = "download") -> list[tuple[int, int]]:
    """(first, behind the last) of the ranges asked for, in order."""
    found = [exchange.range for exchange in hub.record if exchange.endpoint == endpoint and exchange.range]
    return [(int(a), int(b) + 1) for a, b in (text.removeprefix("bytes=").split("-") for text in found)]


@pytest.mark.parametrize("guess", [0, 8, 20, 100, 4 << 20])
def test_size_and_header_come_with_opening(opened: Open, hub: Hub, content: bytes, guess: int) -> None:
    source = opened(guess)
    length = int.from_bytes(content[:8], "little")
    assert (source.size, source.where, source.streamed) == (len(content), WHERE, True)
    before = len(hub.record)
    assert source.header() == content[8 : 8 + length]
    assert len(hub.record) == before, "it has been read"
    expected = min(max(guess, 8), len(content))
    rest = [(expected, 8 + length)] if expected < 8 + length else []
    assert [(a, min(b, len(content))) for a, b in spans(hub)] == [(0, expected), *rest]
    assert source.header() == content[8 : 8 + length], "and may be read again"


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (17, 4_243), (SIZE - 5, SIZE), (0, SIZE), (1, 1 << 20)])
def test_any_range_equals_a_slice(opened: Open, content: bytes, start: int, stop: int) -> None:
    assert read(opened(), start, stop) == content[start:stop]


def test_large_reads_are_shared_out_among_connections(
    opened: Open, hub: Hub, content: bytes, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened()
    hub.record.clear()
    tally.total = 0
    assert read(source, 1000, SIZE) == content[1000:SIZE]
    assert len(spans(hub)) == ranges.LANES
    assert coalesce(spans(hub)) == [(1000, SIZE)]
    assert {max(0, b - a) // 1000 for a, b in spans(hub)} == {(SIZE - 1000) // ranges.LANES // 1000}
    assert tally.total == SIZE - 1000 == sum(exchange.served for exchange in hub.record)
    hub.record.clear()
    monkeypatch.setattr(ranges, "MOST_PIECE", 1 << 18)
    assert read(source, 0, SIZE) == content[:SIZE]
    assert len(spans(hub)) == SIZE >> 18


def test_adjacent_parts_travel_together(opened: Open, hub: Hub, content: bytes) -> None:
    source = opened()
    hub.record.clear()
    wanted = [(5000, 100), (100, 50), (5100, 1), (150, 4), (9000, 0), (7000, 2), (5050, 300)]
    buffers = [(at, bytearray(count)) for at, count in wanted]
    source.read_many([(at, memoryview(buffer)) for at, buffer in buffers])
    assert all(bytes(buffer) == content[at : at + len(buffer)] for at, buffer in buffers)
    assert sorted(spans(hub)) == [(100, 154), (5000, 5350), (7000, 7002)]


def test_samples_close_to_one_another_travel_together(opened: Open, hub: Hub, content: bytes, tally: Tally) -> None:
    source = opened()
    hub.record.clear()
    tally.total = 0
    buffers = [(at, bytearray(64)) for at in (0, 3000, 3064 + 4096, 7224 + 4097, 1 << 20, (1 << 20) + 32)]
    source.sample([(at, memoryview(buffer)) for at, buffer in buffers])
    assert all(bytes(buffer) == content[at : at + 64] for at, buffer in buffers)
    assert sorted(spans(hub)) == [(0, 7224), (11321, 11385), (1 << 20, (1 << 20) + 96)]
    assert tally.total == source.sample_bytes([(at, 64) for at, _ in buffers]) == 7224 + 64 + 96


def test_beyond_the_end(opened: Open, content: bytes) -> None:
    source = opened()
    with pytest.raises(TransferError, match=f"{WHERE}: ends at byte {len(content)}, asked for"):
        read(source, SIZE, len(content) + 1)


def test_threads_may_read_at_once(opened: Open, content: bytes) -> None:
    source = opened()
    found: dict[int, bytes] = {}

    def some(at: int) -> None:
        found[at] = read(source, at, at + 700_000)

    threads = [Thread(target=some, args=(at,)) for at in range(0, SIZE - 700_000, 300_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(raw == content[at : at + 700_000] for at, raw in found.items())


def test_a_signed_address_is_asked_for_once_and_again_when_it_has_expired(
    opened: Open, hub: Hub, content: bytes
) -> None:
    source = opened()
    for at in range(0, 50_000, 10_000):
        assert read(source, at, at + 10) == content[at : at + 10]
    assert hub.traffic()["resolve"].requests == 1
    hub.expire_links()
    assert read(source, 5, SIZE) == content[5:SIZE]
    assert 2 <= hub.traffic()["resolve"].requests <= 1 + ranges.LANES
    refused = [exchange for exchange in hub.record if exchange.status == 403]
    assert 1 <= len(refused) <= ranges.LANES


def test_the_login_goes_to_the_hub_alone(opened: Open, hub: Hub, content: bytes) -> None:
    assert read(opened(), 0, SIZE) == content[:SIZE]
    assert {e.authorization is None for e in hub.record if e.host == "storage"} == {True}
    assert {e.authorization is None for e in hub.record if e.host == "hub"} == {False}


def test_a_hub_that_serves_the_files_itself(hub: Hub, opened: Open, content: bytes) -> None:
    hub.redirects = False
    assert read(opened(), 100, SIZE) == content[100:SIZE]
    assert "download" not in hub.traffic()


MISBEHAVIOUR = {
    "5xx": Fault("status", path=BYTES, status=503, times=2),
    "Bad Gateway": Fault("status", path=BYTES, status=502, times=3),
    "429 with Retry-After": Fault("rate_limit", path=BYTES, seconds=0, times=2),
    "connection reset": Fault("reset", path=BYTES, nbytes=100_000, times=3),
    "connection reset at once": Fault("reset", path=BYTES, nbytes=0, times=2),
    "range ignored": Fault("ignore_range", path=BYTES, times=2),
    "short body": Fault("short_body", path=BYTES, nbytes=70_001, times=3),
    "empty body": Fault("short_body", path=BYTES, nbytes=0, times=2),
    "wrong Content-Range": Fault("wrong_range", path=BYTES, times=2),
    "expired": Fault("expired", path=BYTES, times=2),
}


@pytest.mark.parametrize("fault", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_what_passes_is_survived(opened: Open, hub: Hub, content: bytes, fault: Fault) -> None:
    source = opened()
    armed = hub.misbehave(fault)
    assert read(source, 3, SIZE) == content[3:SIZE]
    assert armed.struck == fault.times


@pytest.mark.parametrize("fault", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_what_does_not_pass_is_one_line(opened: Open, hub: Hub, content: bytes, fault: Fault) -> None:
    source = opened()
    hub.misbehave(Fault(fault.kind, path=BYTES, status=fault.status, nbytes=0, seconds=0, times=None))
    with pytest.raises(TransferError) as caught:
        read(source, 1000, SIZE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}, bytes ")
    start, stop = message.removeprefix(f"{WHERE}, bytes ").partition(":")[0].split("-")
    assert 1000 <= int(start) <= int(stop) < SIZE
    assert f"; tried {tries.TRIES} times, run again to go on" in message
    assert "http" not in message and "hf_" not in message and "\n" not in message


def test_a_broken_read_goes_on_behind_the_last_good_byte(opened: Open, hub: Hub, content: bytes) -> None:
    source = opened()
    hub.record.clear()
    hub.misbehave(Fault("short_body", path=BYTES, nbytes=30_000, times=2))
    assert read(source, 0, 200_000) == content[:200_000]
    assert spans(hub) == [(0, 200_000), (30_000, 200_000), (60_000, 200_000)]


def test_as_long_as_there_is_progress_nobody_counts(opened: Open, hub: Hub, content: bytes) -> None:
    source = opened()
    fault = hub.misbehave(Fault("short_body", path=BYTES, nbytes=ranges.PROGRESS_BYTES, times=None))
    assert read(source, 0, SIZE) == content[:SIZE]
    assert fault.struck > 2 * tries.TRIES


def test_an_answer_that_does_not_come(opened: Open, hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    armed = hub.misbehave(Fault("stall", path=BYTES, seconds=2, times=1))
    assert read(source, 0, 1000) == content[:1000]
    assert armed.struck == 1
    hub.misbehave(Fault("stall", path=BYTES, seconds=2, times=None))
    with pytest.raises(TransferError, match=f"{WHERE}, bytes 0-999: no answer in time; tried {tries.TRIES} times"):
        read(source, 0, 1000)


def test_a_drip_is_given_up(opened: Open, hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened()
    monkeypatch.setattr(ranges, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(ranges, "SLOW_RATE", 1e6)
    armed = hub.misbehave(Fault("slow", path=BYTES, nbytes=100, seconds=0.02, times=2))
    assert read(source, 0, 100_000) == content[:100_000]
    assert armed.struck == 2
    hub.misbehave(Fault("slow", path=BYTES, nbytes=100, seconds=0.02, times=None))
    with pytest.raises(TransferError, match=rf"{WHERE}, bytes \d+-99999: \d+ bytes in 0 seconds; tried"):
        read(source, 0, 100_000)


def test_the_server_says_how_long_to_wait(
    opened: Open, hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    source = opened()
    monkeypatch.setattr(ranges.Event, "wait", lambda self, seconds=None: waited.append(seconds))
    hub.misbehave(Fault("rate_limit", path=BYTES, seconds=7, times=1))
    assert read(source, 0, 100) == content[:100]
    hub.misbehave(Fault("status", path=BYTES, times=3))
    assert read(source, 0, 100) == content[:100]
    assert waited == [7, 0.01, 0.02, 0.02]
    hub.misbehave(Fault("rate_limit", path=BYTES, seconds=100_000, times=1))
    with pytest.raises(TransferError, match="the server answered 429, and asks to wait 100000 seconds"):
        read(source, 0, 100)


def test_an_error_reaches_the_caller_when_nothing_is_written_any_more(
    opened: Open, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened()
    buffer = bytearray(SIZE)
    hub.misbehave(Fault("status", path=BYTES, times=None, status=404, after=1))
    with pytest.raises(TransferError):
        source.read_into(memoryview(buffer), 0)
    before = bytes(buffer)
    hub.behave()
    assert bytes(buffer) == before


def test_a_file_that_is_not_there(opened: Open) -> None:
    with pytest.raises(CheckpointError, match=r"file none.safetensors: the repository has no such file"):
        opened(name="none.safetensors")


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"", "truncated: 0 bytes"), (b"1234", "truncated: 4 bytes"), (b"x" * 99, "not a safetensors file")],
)
@pytest.mark.parametrize("guess", [0, 50, 1000])
def test_what_is_no_safetensors_file(opened: Open, hub: Hub, raw: bytes, words: str, guess: int) -> None:
    hub.move_branch("org/m", {NAME: raw})
    with pytest.raises(HeaderError, match=f"{WHERE}: {words}"):
        opened(guess)


def test_a_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < (tries._wait_asked_for({"Retry-After": soon}) or 0) <= 90
    assert tries._wait_asked_for({"Retry-After": format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)}) == 0
    assert tries._wait_asked_for({"ratelimit": '"api";r=0;t=55', "Retry-After": "3"}) == 56
    assert tries._wait_asked_for({"ratelimit": '"api";r=4;t=55', "Retry-After": "3"}) == 3
    assert tries._wait_asked_for({"Retry-After": "soon"}) is None is tries._wait_asked_for({})
