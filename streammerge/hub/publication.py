"""A merge's push, from the first check to the commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.checkpoints.journal_text import BEFORE_ANYTHING
from streammerge.checkpoints.layout import file_names
from streammerge.checkpoints.output import WORK_DIR, files_of_manifest
from streammerge.checkpoints.room import DiskRoom
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError, TransferError
from streammerge.hub.commit import Commit, LostObjectsError, Pushed
from streammerge.hub.destination import Destination, local_paths, notes_of, unwritable_text
from streammerge.hub.files import PushedFile
from streammerge.hub.ledger import Ledger
from streammerge.hub.settings import PushSettings
from streammerge.hub.target import UPLOADS, HubTarget
from streammerge.hub.uploads import Uploads
from streammerge.hub.xet import is_writable, require_xet_cache
from streammerge.plan import MergePlan
from streammerge.progress import tell
from streammerge.schema import build


class Publication:
    """Uploads a merge's shards while it runs, and commits them with the other files at its end.

    In order: `check`, `check_merge`, `uploaded_before`, `begin`, `commit`.
    """

    def __init__(self, settings: PushSettings) -> None:
        self.settings, self.target = settings, HubTarget(settings)
        self._ledger: Ledger | None = None
        self._destination: Destination = {}
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

    def check(self, *, keep: bool) -> None:
        """Everything that can be found out about the target before anything is read.

        Args:
            keep: the merge has an output folder.
        """
        if not keep and not is_writable(self.folder()):
            raise TransferError(f"{self.target.where}: {unwritable_text(str(self.folder()))}")
        self.target.check()

    def check_merge(self, job: MergePlan, out: Path | None, *, overwrite: bool) -> Destination:
        """Whether this merge may go there.

        Args:
            out: the output folder, where the merge has one.
            overwrite: replace what is in it.

        Returns:
            Where it goes; told as notes when the push begins.
        """
        where, files = self.target.where, file_names(job.shards)
        references = [job.recipe.base, *(spec.model for spec in job.recipe.models)]
        self.target.check_inputs(
            (model.id, reference.partition("@")[2] or None, model.revision)
            for reference, model in zip(references, job.models, strict=True)
            if model.revision is not None
        )
        self.target.check_weights(files)
        if job.xet_bytes:
            require_xet_cache(where)
        if out is not None and not overwrite:
            self._refuse_finished(out)
        sources = [{"id": model.id, "revision": model.revision} for model in job.models]  # the recipe has the Fishers
        paths = local_paths({"sources": sources, "recipe": job.recipe.model_dump()})
        unwritable = None if out is not None or is_writable(self.folder()) else str(self.folder())
        self._destination = {**self.target.destination(files), "unwritable": unwritable, "local_paths": paths}
        return self._destination

    def _refuse_finished(self, out: Path) -> None:
        if files_of_manifest(out, MANIFEST_FILE) and not (out / WORK_DIR).exists():
            raise OutputExistsError(
                f"output folder {out} holds a finished merge: push it with `streammerge push {out} "
                f"{self.settings.repository}`, replace it with --overwrite, or choose another --out"
            )

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
        for note in notes_of(self._destination):
            tell(note)
        try:
            head = self.target.prepare()
            if not self._opened.begun or self.settings.parent_commit is not None:
                self._opened.begin(head)
            elif head != self._opened.head and not self._opened.committing and not self.settings.create_pr:
                raise self.target.moved(self._opened.head, head)
        except TransferError:
            if {path.name for path in writer.work.iterdir()} <= BEFORE_ANYTHING and not self._opened.uploaded:
                writer.discard()
            raise
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
