"""From what the user typed to a model: a local path, or a model on the Hugging Face Hub.

DIR                      an existing folder
org/name[@revision]      a Hub repository, where no such folder exists
hf://org/name[@revision] a Hub repository, always
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, RecipeError
from streammerge.hub.pull import HubMode, hub_files
from streammerge.names import Named, named, unsafe_name
from streammerge.schema import suggest

HUB_SCHEME = "hf://"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"@[0-9a-f]{40}\Z")


def open_model(reference: Named, hub_mode: HubMode = "cache", progress: bool = False) -> Checkpoint:
    """Find a model and open its headers.

    Everything of a model on the Hub is taken from one commit, which is the checkpoint's revision. `HF_ENDPOINT`,
    `HF_HOME`, `HF_HUB_OFFLINE` and the usual login are honoured.

    Args:
        reference: see above.
        hub_mode: how the weights of a model on the Hub are read, see `HubMode`.
        progress: show the progress of downloads on a terminal.

    Raises:
        RecipeError: no such mode.
        CheckpointError: no such folder or repository, no access to it, or not a model that can be read.
        TransferError: the Hub cannot be reached.
    """
    if hub_mode not in get_args(HubMode):
        raise RecipeError(f"--hub-mode: there is no {hub_mode!r}: {suggest(hub_mode, get_args(HubMode))}")
    reference = named(reference)
    hub_only = reference.startswith(HUB_SCHEME)
    name = reference.removeprefix(HUB_SCHEME)
    if not hub_only and os.path.isdir(name):  # unlike Path.is_dir, False for a name the system cannot hold
        return Checkpoint.open(Path(name))
    if not hub_only and os.path.isfile(name):
        raise CheckpointError(f"model {name}: this is a file: give the folder it is in")
    repository, at, revision = name.partition("@")
    if not _REPOSITORY.fullmatch(repository):
        kind = "Hub repository id (org/name[@revision])" if hub_only else "folder, nor a Hub repository id (org/name)"
        raise CheckpointError(f"model {name}: there is no such {kind}")
    if revision and (reason := unsafe_name(revision)):  # it becomes part of a path in the cache
        raise CheckpointError(f"model {name}: there is no such revision: {reason}")
    if at and not revision:
        raise CheckpointError(f"model {name}: nothing after the @: name a branch, tag or commit, or leave out the @")
    files, commit = hub_files(repository, revision or None, hub_mode, progress)
    try:
        return Checkpoint.of(files, revision=commit)
    except BaseException:
        files.close()
        raise


def require_pinned(reference: Named) -> None:
    """Refuse a model on the Hub whose revision may come to mean other files, before any code of it is run.

    Raises:
        RecipeError: the reference names no full commit.
    """
    reference = named(reference)
    name = reference.removeprefix(HUB_SCHEME)
    if (name != reference or not os.path.isdir(name)) and not _COMMIT.search(name):
        raise RecipeError(f"--trust-remote-code: pin {name} to the commit you have read: {name.split('@')[0]}@COMMIT")
