"""Memory of the Hub's client beside a merge, and of hf_xet, its transport in Rust, kept within `--max-ram`.

Xet works with blocks of 64 MB, of which several are in memory however few are let onto the network. So it gets a
share of the budget where that is large enough, and else files travel by plain HTTP, uploads by LFS, which takes
nothing to speak of and gives the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from streammerge.errors import TransferError

CLIENT_BYTES = 20 << 20  # what pushing takes in the client itself, on top of what importing torch takes

# Measured with the limits below, whatever the size of the files and the speed of the network: 190 to 275 MiB for an
# upload at a time, 120 to 145 MiB for two downloads.
_UPLOAD_BYTES, _DOWNLOAD_BYTES = 280 << 20, 144 << 20
_LEAST_LEFT = 96 << 20  # for the merge itself

# Read when hf_xet makes its session; by default the buffers grow with the machine, to gigabytes.
_LIMITS = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "32mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "128mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "32mb",
    "HF_XET_CLIENT_AC_MAX_DOWNLOAD_CONCURRENCY": "8",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "1",  # each more takes a block of 64 MB
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "HF_XET_DATA_INGESTION_BLOCK_SIZE": "1mb",
}


def limit_xet_memory() -> None:
    """Set the limits that the environment does not set already, and undo the mode that lifts them all."""
    os.environ.pop("HF_XET_HIGH_PERFORMANCE", None)
    os.environ.pop("HF_XET_HP", None)
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)


def has_xet() -> bool:
    """Whether the client would use Xet."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def xet_share(max_ram: int, *, uploads: bool, downloads: bool) -> int:
    """The bytes of `max_ram` that hf_xet gets for these transfers; 0: it is not to be used."""
    share = uploads * _UPLOAD_BYTES + downloads * _DOWNLOAD_BYTES
    return share if share and max_ram - share >= _LEAST_LEFT and has_xet() else 0


def ram_for_xet(*, uploads: bool, downloads: bool) -> int:
    """The least `max_ram` with which `xet_share` gives anything."""
    return uploads * _UPLOAD_BYTES + downloads * _DOWNLOAD_BYTES + _LEAST_LEFT


def require_xet_cache(where: str) -> None:
    """Refuse a push by Xet where it could not keep what it keeps meanwhile.

    Raises:
        TransferError: with the ways out.
    """
    from huggingface_hub import constants

    if has_xet() and not is_writable(Path(constants.HF_XET_CACHE)):
        raise TransferError(
            f"{where}: Xet cannot write into {constants.HF_XET_CACHE}: set HF_HOME or HF_XET_CACHE to a folder where "
            "it can, or HF_HUB_DISABLE_XET=1"
        )


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is missing."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@contextmanager
def transfers(*, by_xet: bool) -> Iterator[None]:
    """Have huggingface_hub use Xet, where the environment lets it, or not; in the whole process."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or not by_xet
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
