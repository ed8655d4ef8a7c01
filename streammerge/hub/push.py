"""Pushing a finished merge that lies in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.errors import CheckpointError
from streammerge.hub.commit import Commit, LostObjectsError
from streammerge.hub.destination import local_paths, notes_of
from streammerge.hub.files import PushedFile
from streammerge.hub.settings import PushSettings
from streammerge.hub.target import UPLOADS, HubTarget
from streammerge.hub.xet import require_xet_cache
from streammerge.names import stays_inside
from streammerge.progress import progress_bar, tell
from streammerge.schema import build
from streammerge.verify import verify
from streammerge.verify.manifest import Manifest, read_manifest


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    delete_patterns: Sequence[str] = (),
    parent_commit: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Push the output folder of a merge to the Hugging Face Hub, in one commit.

    First the right to write, then the folder against its manifest are checked. Only the files that the manifest
    names are pushed. Interrupted, the same call uploads what is missing and makes the commit unless it was made.

    Args:
        folder: an output folder of `merge`.
        repository: org/name; made where there is none.
        private: visibility of a repository that is made.
        revision: branch, made where there is none; main by default.
        create_pr: open a pull request instead of changing the branch.
        commit_message: message of the commit, or title of the pull request.
        delete_patterns: globs of other files in the repository to delete in the same commit; all others stay.
        parent_commit: what the branch must be at: a push that would come after anything else is refused.
        progress: show progress bars on standard error.

    Returns:
        {"url", "commit", "pull_request": refs/pr/N or None, "new": False where the very model was there already}.

    Raises:
        RecipeError: a repository or commit that cannot be one.
        CheckpointError: the folder is no finished merge, or not what its manifest says.
        OutputExistsError: the repository holds weights that would not go with these.
        TransferError: not logged in, no right to write, a branch that moved meanwhile, or an upload that failed.
    """
    values = {
        "repository": repository,
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
        "delete_patterns": list(delete_patterns),
        "parent_commit": parent_commit,
    }
    target = HubTarget(build(PushSettings, values, "push"))
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in (MANIFEST_FILE, *manifest.files, *manifest.shards):
        if not stays_inside(folder, name):
            raise CheckpointError(f"{folder}, file {name}: a link to a file outside of the folder, which is not pushed")
    if manifest.shards:
        require_xet_cache(target.where)
    target.check()
    target.check_weights(manifest.files)
    checked = verify(folder, progress=progress)
    if not checked["ok"]:
        raise CheckpointError(f"{folder}: {checked['problems'][0]}: nothing is pushed; merge again")
    _tell(target, folder, manifest)
    parent = target.prepare()
    names = sorted({*manifest.files, MANIFEST_FILE} - manifest.shards.keys())
    files = {name: PushedFile.of(folder / name) for name in names}
    lost = list(manifest.shards)
    for _ in range(UPLOADS):
        with progress_bar(sum(manifest.shards[file].bytes for file in lost), "Upload", "B", progress) as bar:
            for file in lost:
                shard = PushedFile(folder / file, manifest.shards[file].bytes, manifest.shards[file].sha256)
                uploaded = target.upload(file, shard)
                files[file] = PushedFile(None, shard.size, shard.sha256) if uploaded else shard
                bar.update(shard.size)
        try:
            return asdict(Commit(target, files, parent, f"Upload a merge by {manifest.recipe.method}").make())
        except LostObjectsError as error:
            lost = error.files
    raise target.loses(lost[0])


def _tell(target: HubTarget, folder: Path, manifest: Manifest) -> None:
    """Say what the push replaces, unless it is this very model, and what the manifest shows of this machine."""
    told = target.destination(manifest.files)
    if told["replaces"]:
        there = target.files(told["commit"])
        shards = {name: PushedFile(None, shard.bytes, shard.sha256) for name, shard in manifest.shards.items()}
        if all(name in there and shard.is_same(there[name]) for name, shard in shards.items()):
            told["replaces"] = []
    paths = local_paths(json.loads((folder / MANIFEST_FILE).read_bytes()))
    for note in notes_of({**told, "unwritable": None, "local_paths": paths}):
        tell(note)
