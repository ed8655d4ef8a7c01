"""The one commit that makes a pushed model visible: all of it, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.errors import TransferError
from streammerge.hub.files import PushedFile
from streammerge.hub.operations import (
    card_warnings_told,
    file_operation,
    is_ignored,
    missing_objects,
    uploaded_operation,
)
from streammerge.hub.refusals import ATTEMPTS, is_transient, status_of, waiting_time
from streammerge.hub.target import HubTarget

_CONFLICT = (409, 412)


@dataclass(frozen=True)
class Pushed:
    """Where a pushed model is to be seen.

    Attributes:
        url: of the commit, or of the pull request.
        commit: its 40 digits.
        pull_request: the pull request's revision, refs/pr/N; None for a push to a branch.
        new: False where the branch held this very model from the start, so that there was nothing to commit.
    """

    url: str
    commit: str
    pull_request: str | None
    new: bool


class LostObjectsError(Exception):
    """The Hub has shards no more that were uploaded; `files` names them."""

    def __init__(self, files: list[str]) -> None:
        super().__init__(", ".join(files))
        self.files = files


class Commit:
    """The commit of one push.

    Args:
        files: all files of the model, by name. A shard without content was uploaded before.
        parent: what the branch must be at.
        message: of the commit, where the settings have none.
    """

    def __init__(self, target: HubTarget, files: Mapping[str, PushedFile], parent: str | None, message: str) -> None:
        self._target, self._files, self._parent = target, files, parent
        self._message = target.settings.commit_message or message

    def make(self, before: Callable[[], None] = lambda: None) -> Pushed:
        """Make the commit, once: before it is asked for, and again where an answer got lost, look whether it is there.

        Args:
            before: called before the first attempt.

        Raises:
            LostObjectsError: shards must be uploaded once more.
            TransferError: the branch is at another commit than `parent`, or the Hub refuses.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if (made := self._made()) is not None:
                return made
            before()
            try:
                return self._ask()
            except TransferError:
                raise
            except Exception as error:
                if status_of(error) not in _CONFLICT and not is_transient(error):
                    self._raise_lost()
                    raise self._refusal(error) from error
                time.sleep(waiting_time(error, attempt))
                failure = error
        if (made := self._made()) is not None:
            return made
        raise self._refusal(failure) from failure

    def _made(self) -> Pushed | None:
        """The model as it is there already; None where it is not, and the branch is where it should be."""
        if self._target.settings.create_pr:
            return self._pull_request()
        head = self._target.head()
        if head is not None and self._is_at(head):
            return Pushed(self._url("commit", head), head, None, head != self._parent)
        if head != self._parent:
            raise self._target.moved(self._parent, head)
        return None

    def _pull_request(self) -> Pushed | None:
        """The open pull request of this title with this very model."""
        found = self._target.call("listing pull requests", "get_repo_discussions", discussion_type="pull_request")
        for pull in found:
            ref = f"refs/pr/{pull.num}"
            if pull.title == self._message.strip() and pull.status in ("open", "draft") and self._is_at(ref):
                return Pushed(self._url("discussions", str(pull.num)), self._target.head(ref) or "", ref, True)
        return None

    def _is_at(self, revision: str) -> bool:
        """Whether a revision holds the model, and nothing that is to be deleted."""
        there = self._target.files(revision)
        same = all(name in there and file.is_same(there[name]) for name, file in self._files.items())
        return same and not {*self._target.doomed(there)} - {*self._files}

    def _ask(self) -> Pushed:
        """One attempt."""
        from huggingface_hub import CommitOperationDelete

        target, settings = self._target, self._target.settings
        parent = None if settings.create_pr else self._parent  # a pull request may lag behind its branch
        adding = [self._operation(name, file) for name, file in self._files.items()]
        options: dict[str, Any] = {"revision": settings.branch, "create_pr": settings.create_pr, "num_threads": 1}
        target.once("preupload_lfs_files", additions=adding, free_memory=False, **options)
        for operation in adding:
            if is_ignored(operation):
                raise TransferError(
                    f"{target.where}, file {operation.path_in_repo}: the repository's .gitignore leaves it out: take "
                    "that line out of it"
                )
        there = target.files(parent or target.head()) if settings.delete_patterns else {}
        deleting = [
            CommitOperationDelete(path, is_folder=False) for path in target.doomed(there) if path not in self._files
        ]
        options |= {"commit_message": self._message, "parent_commit": parent}
        with card_warnings_told():
            info = target.once("create_commit", operations=[*deleting, *adding], **options)
        return Pushed(info.pr_url or info.commit_url, info.oid, info.pr_revision, True)

    def _operation(self, name: str, file: PushedFile) -> Any:
        if file.content is None:
            return uploaded_operation(name, file.size, file.sha256)
        return file_operation(name, file.content, file.sha256)

    def _raise_lost(self) -> None:
        objects = {name: (file.size, file.sha256) for name, file in self._files.items() if file.content is None}
        try:
            lost = missing_objects(self._target.settings.repository, self._target.api.endpoint, objects)
        except Exception:
            return  # the refusal itself says more
        if lost:
            raise LostObjectsError(lost)

    def _refusal(self, error: Exception) -> TransferError:
        return self._target.refusal("the commit", error)

    def _url(self, kind: str, name: str) -> str:
        return f"{self._target.api.endpoint}/{self._target.settings.repository}/{kind}/{name}"
