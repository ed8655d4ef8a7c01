"""Memory of the Hub's client beside a merge, and of hf_xet, its transport in Rust, kept to what can be spared."""

import os
from importlib.util import find_spec

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


def push_bytes() -> int:
    """Host memory that pushing takes beside a merge: the client, and where it is used hf_xet with these limits.

    Measured: 250 to 275 MiB for any size of file and speed of the network, a few blocks of 64 MB on their way.
    """
    from huggingface_hub.constants import HF_HUB_DISABLE_XET

    return _CLIENT_BYTES + (0 if HF_HUB_DISABLE_XET or find_spec("hf_xet") is None else _XET_BYTES)


_CLIENT_BYTES = 20 << 20
_XET_BYTES = 280 << 20
