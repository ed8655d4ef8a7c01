"""Trying again what may go well the next time: which failures those are, how long to wait, how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import TypeVar

from streammerge.errors import CheckpointError, TransferError
from streammerge.hub.login import FLAWED_TOKEN, is_logged_in, is_token_flawed, refused_token
from streammerge.progress import quiet_logger

TRIES = 6  # in a row without progress
FIRST_WAIT, LONGEST_WAIT = 1.0, 16.0  # seconds; doubled from one try to the next
LONGEST_RETRY_AFTER = 600.0  # seconds a server may ask for

_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})

Found = TypeVar("Found")


class PassingError(Exception):
    """A failure that another try may mend.

    Args:
        reason: what went wrong; never holds an address, which may be signed.
        wait: seconds to wait; None: as long as it takes, longer every time.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def persist(
    where: Callable[[], str],
    attempt: Callable[[], Found],
    stop: Event,
    progress: Callable[[], bool] = lambda: False,
    tries: int = TRIES,
) -> Found:
    """Call `attempt` until it raises no PassingError.

    Args:
        where: what messages name, at the time.
        attempt: one try.
        stop: set where it is of no use any more.
        progress: whether the last try, though it failed, went far enough not to be counted.
        tries: how many in a row.

    Raises:
        TransferError: it failed too often, or was stopped.
    """
    failed, wait = 0, FIRST_WAIT
    while not stop.is_set():
        try:
            return attempt()
        except PassingError as failure:
            if progress():
                failed, wait = 0, FIRST_WAIT
            failed += 1
            if failed >= tries:
                raise TransferError(f"{where()}: {failure}; tried {tries} times, run again to go on") from failure
            if failure.wait is not None and failure.wait > LONGEST_RETRY_AFTER:
                raise TransferError(f"{where()}: {failure}, and asks to wait {failure.wait:.0f} seconds") from failure
            stop.wait(wait if failure.wait is None else failure.wait)
            wait = min(2 * wait, LONGEST_WAIT)
    raise TransferError(f"{where()}: stopped")


@contextmanager
def hub_errors(model: str, where: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into errors of ours, or into PassingError.

    No message of theirs is passed on nor logged, for those hold addresses; `model` and `where` begin ours.
    """
    import httpx2
    from huggingface_hub import errors

    if is_token_flawed():
        raise CheckpointError(f"{model}: {FLAWED_TOKEN}")
    try:
        with quiet_logger("huggingface_hub"):
            yield
    except errors.GatedRepoError:
        after = ", as whom you are logged in" if is_logged_in() else f", then {_LOGIN}"
        raise CheckpointError(f"{model}: gated: ask for access on its page{after}") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{model}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{model}: no such folder here and no such repository on the Hub, or no access to it: "
            f"check the spelling; for a private one, {_LOGIN}"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise TransferError(f"{where}: not in the local cache, and the Hub cannot be reached (offline?)") from None
    except errors.LocalEntryNotFoundError:
        raise PassingError("the Hub cannot be reached") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{where}: the repository has no such file in this revision") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _WORTH_ANOTHER_TRY:
            raise PassingError(f"the server answered {status}", _wait_asked_for(error.response.headers)) from None
        if status == 401:
            raise CheckpointError(f"{model}: {refused_token()}") from None
        raise TransferError(f"{where}: the server answered {status}") from None
    except httpx2.TimeoutException as error:
        raise PassingError("no answer in time") from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
        raise CheckpointError(f"{model}: {NO_ADDRESS}") from None
    except (httpx2.TransportError, RuntimeError) as error:  # the latter where another thread closed the session
        raise PassingError(f"the connection failed ({type(error).__name__})") from error
    except httpx2.HTTPError as error:
        raise TransferError(f"{where}: {type(error).__name__}") from error


_LOGIN = "`hf auth login`"
NO_ADDRESS = "HF_ENDPOINT is no address of a Hub: it begins with http:// or https://"


def _wait_asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds, from the Hub's rate-limit headers or from Retry-After; None: nothing is asked for."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # in its __all__

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()) if asked else None
    except (TypeError, ValueError):
        return None
