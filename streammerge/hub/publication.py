"""A merge's push, from the first check to the commit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.room import DiskRoom
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.hub.commit import Commit, LostObjectsError, Pushed
from streammerge.hub.ledger import Ledger
from streammerge.hub.settings import PushSettings
from streammerge.hub.target import UPLOADS, HubTarget, PushedFile
from streammerge.hub.uploads import Uploads
from streammerge.schema import build


class Publication:
    """Uploads a merge's shards while it runs, and commits them with the other files at its end.

    In order: `check`, `check_weights`, `uploaded_before`, `begin`, `commit`.
    """

    def __init__(self, settings: PushSettings) -> None:
        self.settings, self.target = settings, HubTarget(settings)
        self._ledger: Ledger | None = None
        self._rounds = 0

    def folder(self) -> Path:
        """Where a merge that is pushed and not kept has its work folder: the same for the same target.

        It is in huggingface_hub's cache of other libraries' files, `HF_ASSETS_CACHE`: on disk, where a temporary
        folder may be in memory, and it outlives the process.
        """
        from huggingface_hub.constants import HF_ASSETS_CACHE

        settings = self.settings
        target = f"{self.target.api.endpoint} {settings.repository} {settings.branch} {settings.create_pr}"
        name = settings.repository.replace("/", "--") + "-" + hashlib.sha256(target.encode()).hexdigest()[:8]
        return Path(HF_ASSETS_CACHE) / "streammerge" / "push" / name

    def tidy(self) -> None:
        """Remove that folder, and those made around it, where they are empty."""
        with suppress(OSError):
            for folder in (self.folder(), *self.folder().parents[:2]):
                disk.remove_folder(folder)

    def check(self) -> None:
        """Everything that can be found out about the target before anything is read."""
        self.target.check()

    def check_weights(self, files: Iterable[str]) -> None:
        """Whether the model's weight files may come beside what is there."""
        self.target.check_weights(files)

    def uploaded_before(self, work: Path) -> Mapping[str, str]:
        """Open the ledger in the writer's work folder: the shards that the Hub has, with their SHA-256."""
        self._ledger = Ledger(work, self.settings, self.target.api.endpoint)
        return self._ledger.uploaded

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def begin(self, writer: CheckpointWriter, *, keep: bool, progress: bool) -> Uploads:
        """Make repository and branch if need be, and fix the commit that ours comes after.

        Args:
            keep: leave the shards in the folder; else each goes once it is uploaded.

        Returns:
            What uploads the shards; to be entered.

        Raises:
            TransferError: the branch moved since an earlier run began this push.
        """
        head = self.target.prepare()
        if not self._opened.begun or self.settings.parent_commit is not None:
            self._opened.begin(head)
        elif head != self._opened.head and not self._opened.committing and not self.settings.create_pr:
            raise self.target.moved(self._opened.head, head)
        self._uploads = Uploads(self.target, self._opened, writer, keep=keep, progress=progress)
        return self._uploads

    @property
    def _opened(self) -> Ledger:
        assert self._ledger is not None  # `uploaded_before` comes first
        return self._ledger

    @property
    def room(self) -> DiskRoom:
        """For the engine: whether there is room for another shard."""
        return self._uploads.room

    def commit(self, files: Mapping[str, bytes | Path], message: str) -> Pushed | None:
        """Wait for the uploads and make the commit.

        Args:
            files: everything but the shards.
            message: of the commit, where the settings have none.

        Returns:
            None where the Hub has lost shards, which are now to be merged again.
        """
        self._uploads.wait()
        everything = {name: PushedFile.of(content) for name, content in files.items()} | self._uploads.files()
        try:
            return Commit(self.target, everything, self._opened.head, message).make(self._opened.commit)
        except LostObjectsError as error:
            self._rounds += 1
            if self._rounds == UPLOADS:
                raise self.target.loses(error.files[0]) from None
            for file in error.files:
                self._uploads.again(file)
            return None


def make_publication(push_to_hub: str | PushSettings | Mapping[str, Any] | None) -> Publication | None:
    """The push that a merge is asked for, in one of the ways it can be; None for none.

    Raises:
        RecipeError: settings that make no sense.
    """
    if push_to_hub is None:
        return None
    if isinstance(push_to_hub, str):
        push_to_hub = {"repository": push_to_hub}
    if not isinstance(push_to_hub, PushSettings):
        push_to_hub = build(PushSettings, push_to_hub, "push")
    return Publication(push_to_hub)
