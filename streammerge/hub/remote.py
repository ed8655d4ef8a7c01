"""One address of the Hub, and what it redirects to: over huggingface_hub's own session, endpoint and login."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Lock
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from streammerge._version import __version__
from streammerge.errors import HeaderError
from streammerge.hub.tries import TRIES, PassingError, hub_errors, persist

if TYPE_CHECKING:
    from httpx2 import Response, Timeout

_CONNECT_SECONDS, _POOL_SECONDS = 10.0, 60.0
_REDIRECTS = 5
_DENIED = frozenset({401, 403, 404, 410})


class Tally:
    """Counts the bytes that have come over the network, from any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count


class Remote:
    """What a Hub serves under one address.

    Large files are redirected to an address of another host that is signed and good for a while. It is remembered, to
    spare the Hub a request per range, and asked for again when it is refused. The login never goes to another host.

    Args:
        url: the address at the Hub.
        model: how messages name the model.
        where: how they name what is served.
        tally: counts the bytes of the bodies.
    """

    def __init__(self, url: str, model: str, where: str, tally: Tally) -> None:
        self.url, self.model, self.where, self.tally = url, model, where, tally
        self._target: str | None = None

    @contextmanager
    def get(self, extra: Mapping[str, str]) -> Iterator[Response]:
        """One try at a GET, with extra headers: the response, whose body is yet to be read.

        Raises:
            PassingError: another try may help; also from reading the body inside of the `with`.
            CheckpointError: there is no such model, revision or file, or no access.
            TransferError: anything else.
        """
        from huggingface_hub import get_session, hf_raise_for_status

        with hub_errors(self.model, self.where):
            for _ in range(_REDIRECTS):
                url = self._target or self.url
                request = get_session().build_request(
                    "GET", url, headers={**self._headers(url), **extra}, timeout=_timeout()
                )
                response = get_session().send(request, stream=True, follow_redirects=False)
                try:
                    if response.has_redirect_location:
                        response.read()
                        self._target = urljoin(url, response.headers["Location"])
                        continue
                    if response.status_code in _DENIED and url != self.url and "X-Error-Code" not in response.headers:
                        self._target = None
                        raise PassingError(f"a signed address was refused ({response.status_code})", 0.0)
                    if response.status_code >= 400 and response.status_code != 416:
                        response.read()
                        hf_raise_for_status(response)
                    yield response
                    return
                finally:
                    response.close()
            self._target = None
            raise PassingError("too many redirects")

    def body(self, limit: int, stop: Event, size: int | None = None, tries: int = TRIES) -> bytes:
        """The whole body, tried again from the start where it fails.

        Raises:
            HeaderError: it is larger than `limit`.
        """

        def attempt() -> bytes:
            found = bytearray()
            with self.get({}) as response:
                if response.status_code != 200:
                    raise PassingError(f"answered {response.status_code} instead of 200")
                for chunk in response.iter_bytes():  # decoded, where a proxy compresses texts unasked
                    self.tally.add(len(chunk))
                    found += chunk
                    if len(found) > limit:
                        raise HeaderError(f"{self.where}: larger than {limit} bytes")
            if size is not None and len(found) != size:
                raise PassingError(f"{len(found)} bytes instead of {size}")
            return bytes(found)

        return persist(lambda: self.where, attempt, stop, tries=tries)

    def _headers(self, url: str) -> dict[str, str]:
        """The login goes to the host that was asked, and to no other."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # in its __all__

        mine = origin(url) == origin(self.url)
        headers = build_hf_headers(
            token=None if mine else False, library_name="streammerge", library_version=__version__
        )
        return {**headers, "Accept-Encoding": "identity"}


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _timeout() -> Timeout:
    """Seconds of silence after which a try has failed; HF_HUB_DOWNLOAD_TIMEOUT sets it, as for the client."""
    import httpx2
    from huggingface_hub import constants

    return httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=_CONNECT_SECONDS, pool=_POOL_SECONDS)
