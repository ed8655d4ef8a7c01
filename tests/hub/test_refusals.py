"""What the client raises, in one line of ours."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from streammerge.hub import refusals
from streammerge.hub.login import FLAWED_TOKEN
from streammerge.hub.refusals import is_transient, patiently, refusal, waiting_time

TOKEN = "hf_markerMarkerMarkerMarkerMarker12"


def answer(status: int, message: str | None = None, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("PUT", f"https://storage/x?X-Signature=abc&token={TOKEN}")
    response = httpx2.Response(status, headers=headers, request=request)
    return HfHubHTTPError(f"{status} for {request.url}", response=response, server_message=message)


def wrapped(error: Exception) -> RuntimeError:
    """As the client wraps what goes wrong in an upload."""
    try:
        raise RuntimeError("Error while uploading 'x' to the Hub.") from error
    except RuntimeError as caught:
        return caught


LINES: dict[str, tuple[Exception, str]] = {
    "no token": (LocalTokenNotFoundError("..."), "W: not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"),
    "offline": (OfflineModeIsEnabled("..."), "W: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"),
    "wrong token": (answer(401), "W: the Hub does not accept the token: log in again with `hf auth login`"),
    "no right": (answer(403, "Forbidden."), "W: uploading: not allowed (Forbidden): use a token that may write there"),
    "no address": (
        httpx2.UnsupportedProtocol("x"),
        "W: HF_ENDPOINT is no address of a Hub: it begins with http:// or https://",
    ),
    "no id": (HFValidationError("Bad id."), "W: uploading: HFValidationError (Bad id)"),
    "server": (answer(503), "W: uploading: the Hub answers 503; the same command goes on where it was"),
    "full": (answer(413, "Too large."), "W: uploading: the Hub answers 413 (Too large)"),
    "wrapped": (wrapped(answer(500)), "W: uploading: the storage answers 500; the same command goes on where it was"),
    "expired": (wrapped(answer(403)), "W: uploading: the storage answers 403"),
    "cut": (
        wrapped(httpx2.ReadError("Connection reset")),
        "W: uploading: ReadError (Connection reset); the same command goes on where it was",
    ),
    "several lines": (
        ValueError("LFS batch API returned errors:\n- one\n- two"),
        "W: uploading: ValueError (LFS batch API returned errors: - one - two); the same command goes on where it was",
    ),
    "secrets": (
        answer(400, f"not for {TOKEN}: see https://storage/x?X-Signature=abc&more and https://hub/y"),
        "W: uploading: the Hub answers 400 (not for hf_...: see https://storage/x and https://hub/y)",
    ),
}


@pytest.mark.parametrize(("error", "line"), LINES.values(), ids=LINES)
def test_lines(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert str(refusal("W", "uploading", error)) == line


def test_a_way_around_a_missing_right() -> None:
    assert str(refusal("W", "x", answer(403), propose=True)).endswith(", or propose the model with --create-pr")


def test_a_variable_goes_before_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = str(refusal("W", "x", answer(401)))
    assert line.startswith("W: HF_TOKEN is set and not accepted by the Hub: set it anew, or unset it")


@pytest.mark.parametrize("token", ["hf_\u00fcber", "hf_a\x01b", "hf_a b"])
def test_nothing_is_shown_of_a_token_that_is_none(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    error = UnicodeEncodeError("ascii", f"Bearer {token}", 10, 11, f"no {token}")
    assert str(refusal("W", "x", error)) == f"W: {FLAWED_TOKEN}" and token[3:] not in FLAWED_TOKEN


def test_a_long_story_is_cut() -> None:
    assert len(str(refusal("W", "uploading", answer(400, "word " * 1000)))) < 400


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (answer(500), True),
        (answer(429), True),
        (httpx2.ConnectError("no"), True),
        (httpx2.ReadTimeout("no"), True),
        (answer(412), False),
        (answer(403), False),
        (ValueError("no"), False),
        (httpx2.UnsupportedProtocol("no"), False),
        (httpx2.LocalProtocolError("no"), False),
    ],
)
def test_what_may_pass(error: Exception, transient: bool) -> None:
    assert is_transient(error) == transient


def test_waiting() -> None:
    assert [waiting_time(answer(500), attempt) for attempt in (1, 2, 3)] == [1, 2, 4]
    assert waiting_time(answer(429, **{"Retry-After": "7"}), 1) == 7
    assert waiting_time(answer(429, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), 2) == 2
    assert waiting_time(answer(429, **{"Retry-After": "9999"}), 1) == 600
    assert waiting_time(httpx2.ReadError("no"), 3) == 4


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_FIRST_WAIT", 0.0)
    calls: list[Any] = []

    def failing() -> None:
        calls.append(None)
        raise answer(500)

    with pytest.raises(HfHubHTTPError):
        patiently(failing)
    assert len(calls) == refusals.ATTEMPTS
