"""What a push uses of huggingface_hub beyond its documented calls; a test fails where any of it moves.

The client uploads a file and keeps the operation that stands for it until the commit, in memory. A push that goes on
after an interruption has neither the file nor the operation any more: it makes the operation anew from the size and
the SHA-256, in the state the client would have left it in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.progress import quiet_logger, tell

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def file_operation(name: str, content: bytes | Path, sha256: str | None = None) -> CommitOperationAdd:
    """Add a file; with `sha256`, in hexadecimal, the client need not read it once more for that."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, content)
    if sha256 is not None:
        operation.upload_info.sha256 = bytes.fromhex(sha256)
    return operation


def uploaded_operation(name: str, size: int, sha256: str) -> CommitOperationAdd:
    """Add a file that was uploaded before and need not be here."""
    operation = file_operation(name, b"", sha256)
    operation.upload_info.size = size
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def is_uploaded(operation: CommitOperationAdd) -> bool:
    """Whether the Hub keeps the content already; a small text goes with the commit instead."""
    return operation._is_uploaded


def is_ignored(operation: CommitOperationAdd) -> bool:
    """Whether the repository's .gitignore would silently leave the file out."""
    return bool(operation._should_ignore)


def missing_objects(repository: str, endpoint: str, objects: Mapping[str, tuple[int, str]]) -> list[str]:
    """Those of the large files, name -> (size, SHA-256), that the Hub does not keep (any more)."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    infos = [UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256)) for size, sha256 in objects.values()]
    wanted: set[str] = set()
    for start in range(0, len(infos), _BATCH):
        with quiet_client():
            answers, errors, _ = post_lfs_batch_info(
                infos[start : start + _BATCH], None, "model", repository, endpoint=endpoint
            )
        wanted |= {answer["oid"] for answer in answers if answer.get("actions")}
        wanted |= {error["oid"] for error in errors}
    return [name for name, (_, sha256) in objects.items() if sha256 in wanted]


_BATCH = 256  # objects in one request


@contextmanager
def quiet_client() -> Iterator[None]:
    """Silence the client: it draws a bar for every file, terminal or not, and logs addresses, signatures included."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import disable_progress_bars

    insisted = HF_HUB_DISABLE_PROGRESS_BARS is False  # by the user
    with quiet_logger("huggingface_hub"), nullcontext() if insisted else disable_progress_bars():
        yield


@contextmanager
def card_warnings_told() -> Iterator[None]:
    """Have what the Hub says of the card's metadata told as a note, which the client would as a raw warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _ABOUT_CARD, UserWarning)
        yield
    for warning in caught:
        text = str(warning.message)
        if text.startswith(_ABOUT_CARD):
            tell(f"the Hub says of the card's metadata: {' '.join(text.removeprefix(_ABOUT_CARD).strip(': ').split())}")
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


_ABOUT_CARD = "Warnings while validating metadata in README.md"


def limit_waiting(seconds: Sequence[float]) -> None:
    """Have the client's requests fail after (connecting, reading, writing) seconds without a byte, not wait for ever.

    A client that its user made with limits of their own stays as it is.
    """
    import httpx2
    from huggingface_hub import get_session

    client = get_session()
    if client.timeout == httpx2.Timeout(None):
        connect, read, write = seconds
        client.timeout = httpx2.Timeout(connect=connect, read=read, write=write, pool=None)
