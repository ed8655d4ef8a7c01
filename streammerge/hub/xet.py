"""Memory of hf_xet, the client's transport in Rust, kept to what a merge can spare."""

import os

# Read when hf_xet makes its session; by default the buffers grow with the machine, to gigabytes.
_LIMITS = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "32mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "128mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "32mb",
    "HF_XET_CLIENT_AC_MAX_DOWNLOAD_CONCURRENCY": "8",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",  # blocks of up to 64 MB on their way
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
}


def limit_xet_memory() -> None:
    """Set the limits that the environment does not set already, and undo the mode that lifts them all."""
    os.environ.pop("HF_XET_HIGH_PERFORMANCE", None)
    os.environ.pop("HF_XET_HP", None)
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
