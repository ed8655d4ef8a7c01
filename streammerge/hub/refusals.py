"""What the Hub's client raises, as one line of ours that never holds a token, nor the signature of an address."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from streammerge.errors import TransferError
from streammerge.hub.login import FLAWED_TOKEN, is_token_flawed, refused_token
from streammerge.hub.tries import NO_ADDRESS

ATTEMPTS = 5
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 16.0  # seconds before another attempt
_LONGEST_ASKED = 600.0  # seconds that the Hub may ask for
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_LONGEST_TEXT = 300  # characters of the Hub's own words

Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """Make a call to the Hub that may be made twice, again where it fails for a moment. The client itself tries only
    some of its requests again."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            time.sleep(waiting_time(error, attempt))
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    import httpx2

    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError))
    return status_of(error) in _TRANSIENT


def waiting_time(error: BaseException, attempt: int) -> float:
    """Seconds to wait before attempt number `attempt + 1`: what the Hub asks for, else twice as long each time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return (
        min(_LONGEST_ASKED, float(asked)) if asked.isdigit() else min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1))
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, or None where there was none."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def refusal(where: str, doing: str, error: BaseException, *, propose: bool = False) -> TransferError:
    """One line: the repository and the file (`where`), what was being done, what the Hub said, what to do.

    Args:
        propose: whether a pull request would be a way around a missing right.
    """
    import httpx2
    from huggingface_hub.errors import (
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    stored = isinstance(error, RuntimeError) and error.__cause__ is not None  # the client's wrapping of an upload's
    error = error.__cause__ or error if stored else error
    if is_token_flawed():  # before anything is shown of what stumbled over it
        return TransferError(f"{where}: {FLAWED_TOKEN}")
    if isinstance(error, (httpx2.UnsupportedProtocol, httpx2.InvalidURL)):
        return TransferError(f"{where}: {NO_ADDRESS}")
    if isinstance(error, LocalTokenNotFoundError):
        return TransferError(f"{where}: not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return TransferError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if isinstance(error, RevisionNotFoundError):
        return TransferError(f"{where}: the repository has no such branch or revision")
    if isinstance(error, RepositoryNotFoundError):
        return TransferError(
            f"{where}: no such repository on the Hub, or no access to it: check the spelling, or log in with a token "
            "that may write there (`hf auth login`)"
        )
    status, said = status_of(error), _words(error)
    if status == 401 and not stored:
        return TransferError(f"{where}: {refused_token(said)}")
    if status == 403 and not stored:
        other = ", or propose the model with --create-pr" if propose else ""
        return TransferError(f"{where}: {doing}: not allowed{said}: use a token that may write there{other}")
    if status is not None:
        advice = _AGAIN if status in _TRANSIENT else ""
        return TransferError(f"{where}: {doing}: the {'storage' if stored else 'Hub'} answers {status}{said}{advice}")
    advice = "" if isinstance(error, HFValidationError) else _AGAIN
    return TransferError(f"{where}: {doing}: {type(error).__name__}{said}{advice}")


_AGAIN = "; the same command goes on where it was"


def _words(error: BaseException) -> str:
    """The Hub's words in parentheses, on one line and with nothing secret in them; "" where it said nothing."""
    text = getattr(error, "server_message", None) or (
        "" if getattr(error, "response", None) is not None else str(error)
    )
    text = re.sub(r"\bhf_\w+", "hf_...", " ".join(text.split()))
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)  # signatures are in the query
    return f" ({text[:_LONGEST_TEXT].rstrip('. ')})" if text else ""
