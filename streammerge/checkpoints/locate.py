"""From what the user typed to a folder: a local path, or a model on the Hugging Face Hub.

DIR                      an existing folder
org/name[@revision]      a Hub repository, where no such folder exists
hf://org/name[@revision] a Hub repository, always
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, RecipeError, TransferError

HUB_SCHEME = "hf://"
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
_COMMIT = re.compile(r"@[0-9a-f]{40}$")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py"]
_WANTED += ["*LICENSE*", "*NOTICE*", "tokenizer*", "merges*", "vocab*"]
_UNWANTED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*", "onnx/*"]


@dataclass(frozen=True)
class Location:
    """Where a model lies, how the user named it, and its commit on the Hub (None for a local folder)."""

    folder: Path
    id: str
    revision: str | None


def locate(reference: str) -> Location:
    """Find a model, downloading it into huggingface_hub's cache where it is on the Hub.

    Everything is taken from one commit, which is the location's revision. `HF_ENDPOINT`,
    `HF_HOME`, `HF_HUB_OFFLINE` and the usual login are honoured.

    Raises:
        CheckpointError: no such folder or repository, or no access to it.
        TransferError: the download failed.
    """
    hub_only = reference.startswith(HUB_SCHEME)
    name = reference.removeprefix(HUB_SCHEME)
    if not hub_only and os.path.isdir(name):  # unlike Path.is_dir, False for a name the system cannot hold
        return Location(Path(name), name, None)
    repository, _, revision = name.partition("@")
    if not _REPOSITORY.match(repository):
        kind = "Hub repository id (org/name[@revision])" if hub_only else "folder, nor a Hub repository id (org/name)"
        raise CheckpointError(f"model {name}: there is no such {kind}")
    return _download(repository, revision or None)


def require_pinned(reference: str) -> None:
    """Refuse a model on the Hub whose revision may come to mean other files, before any code of it is run.

    Raises:
        RecipeError: the reference names no full commit.
    """
    name = reference.removeprefix(HUB_SCHEME)
    if (name != reference or not os.path.isdir(name)) and not _COMMIT.search(name):
        raise RecipeError(f"--trust-remote-code: pin {name} to the commit you have read: {name.split('@')[0]}@COMMIT")


def open_model(reference: str) -> Checkpoint:
    """Locate a model and open its headers."""
    location = locate(reference)
    if location.revision is not None and not any(location.folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"model {location.id}: the repository holds no safetensors files, and streammerge loads no pickled ones; "
            f"convert them with transformers: AutoModelForCausalLM.from_pretrained({location.id!r}, dtype='auto')"
            ".save_pretrained(NEW_FOLDER)"
        )
    return Checkpoint.open(location.folder, id=location.id, revision=location.revision)


def _download(repository: str, revision: str | None) -> Location:
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import tqdm as hub_bar

    class TerminalBar(hub_bar):
        """The client's bar, but only on a terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"disable": None, **options})  # type: ignore[no-untyped-call]

    where = f"model {repository}" + (f"@{revision}" if revision else "")
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, tqdm_class=TerminalBar
            )
        )
    except GatedRepoError:
        raise CheckpointError(f"{where}: gated: ask for access on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where}: the repository has no such revision") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: no such folder here and no such repository on the Hub, or no access to it: "
            "check the spelling; for a private one, `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise TransferError(f"{where}: not in the local cache, and the Hub cannot be reached (offline?)") from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise TransferError(f"{where}: download failed: {type(error).__name__}; run again to go on") from error
    return Location(folder, repository, folder.name)  # the cache names a snapshot's folder by its commit
