"""The branch, or the pull request, of a repository on the Hub that a model goes to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from streammerge._version import __version__
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from streammerge.errors import OutputExistsError, TransferError
from streammerge.hub.files import PushedFile
from streammerge.hub.operations import file_operation, is_ignored, is_uploaded, limit_waiting, quiet_client
from streammerge.hub.refusals import ATTEMPTS, patiently, refusal, status_of, waiting_time
from streammerge.hub.settings import PushSettings
from streammerge.hub.xet import limit_xet_memory

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo, RepoFile

UPLOADS = 3  # how often a shard is uploaded that the Hub loses each time
_NO_SUCH = "there is no such repository, or none that you may see"
_WAITING = (20.0, 300.0, 120.0)  # seconds for connecting, for an answer, for a write


class HubTarget:
    """What a push asks of the Hub. Safe to use from two threads.

    Raises:
        TransferError: from every call: the Hub refuses, or cannot be reached.
    """

    def __init__(self, settings: PushSettings) -> None:
        limit_xet_memory()
        from huggingface_hub import HfApi

        self.settings, self.where = settings, f"push to {settings.where}"
        self.api = HfApi(library_name="streammerge", library_version=__version__)
        self._missing = False  # the repository, before `prepare`
        self._branch_missing = False
        self._there: list[str] = []  # its files at the start
        self._at: str | None = None  # the commit of a branch that is there, at the start
        self._private: bool | None = None  # a repository that is there

    def once(self, method: str, **options: Any) -> Any:
        """Call a method of the client on the repository, and let its errors through."""
        limit_waiting(_WAITING)
        with quiet_client():
            answer = getattr(self.api, method)(self.settings.repository, **options)
            return list(answer) if isinstance(answer, Iterator) else answer  # page after page

    def call(self, doing: str, method: str, **options: Any) -> Any:
        """Call a method of the client on the repository, again where it fails for a moment."""
        try:
            return patiently(lambda: self.once(method, **options))
        except Exception as error:
            raise self.refusal(doing, error) from error

    def refusal(self, doing: str, error: Exception) -> TransferError:
        """What the client raised, as an error of ours."""
        propose = not (self.settings.create_pr or self._missing)
        return refusal(self.where, doing, error, propose=propose)

    def check(self) -> None:
        """Find out, changing nothing, whether one may push there."""
        me = self._whoami()
        info = self._info(self.settings.branch)
        if info is None and not self._missing:
            if self.settings.branch.startswith("refs/"):
                raise TransferError(f"{self.where}: the repository has no {self.settings.branch}")
            self._branch_missing, info = True, self._info("main")
        if info is None:
            if self._missing:
                self._check_new(me)
            return
        if self.settings.private and not info.private:
            raise OutputExistsError(f"{self.where}: the repository is public: leave out --private, or push to another")
        if not self.settings.create_pr:
            self._check_right()
        self._check_branch()
        self._there = [entry.rfilename for entry in info.siblings or ()]
        self._at, self._private = None if self._branch_missing else info.sha, info.private
        expected = self.settings.parent_commit
        if expected is not None and expected != info.sha:
            raise TransferError(
                f"{self.where}: it is at {info.sha}, and --parent-commit asks for {expected}: look at what is there, "
                "then give that commit, or leave it out"
            )

    def check_inputs(self, inputs: Iterable[tuple[str, str | None, str]]) -> None:
        """Refuse to overwrite what the merge reads.

        Args:
            inputs: org/name, the revision asked for and its commit of each model on the Hub.

        Raises:
            OutputExistsError: with the ways out.
        """
        for id, asked, commit in inputs:
            same = id.casefold() == self.settings.repository.casefold() and not self.settings.create_pr
            if same and (commit == self._at or (asked or "main") == self.settings.branch):
                raise OutputExistsError(
                    f"{self.where}: it is one of the models merged: push to another repository, to a --revision other "
                    "than the one read, or with --create-pr"
                )

    def destination(self, files: Iterable[str]) -> dict[str, Any]:
        """Where the model goes, as a plan tells it, after `check`.

        Args:
            files: the names of the files to come.
        """
        changes = self._at is not None and not self.settings.create_pr
        replaced = sorted({SINGLE_FILE, INDEX_FILE} & {*self._there} & {*files}) if changes else []
        return {
            "endpoint": self.api.endpoint,
            "repository": self.settings.repository,
            "branch": self.settings.branch,
            "pull_request": self.settings.create_pr,
            "new_repository": self._missing,
            "new_branch": self._branch_missing or (self._missing and self.settings.branch != "main"),
            "private": self.settings.private if self._missing else self._private,
            "commit": self._at,
            "replaces": replaced,
        }

    def check_weights(self, files: Iterable[str]) -> None:
        """Refuse weights that would lie beside others: nobody means such a model, nor knows how it would load.

        Args:
            files: the names of the files to come.

        Raises:
            OutputExistsError: with the option that mends it.
        """
        for old in ({SINGLE_FILE, INDEX_FILE} & {*self._there}) - {*files} - {*self.doomed(self._there)}:
            raise OutputExistsError(
                f"{self.where}: it holds {old}, and the model to come does not: the two together would not load as "
                "either; delete the old weights in the same commit with --delete-patterns 'model*.safetensors*'"
            )

    def prepare(self) -> str | None:
        """Make the repository and the branch where they are missing; the commit the branch is at."""
        settings = self.settings
        if self._missing:
            self._make()
        if self._branch_missing or (self._missing and settings.branch != "main"):
            self.call("making the branch", "create_branch", branch=settings.branch, exist_ok=True)
        self._missing = self._branch_missing = False
        return self.head()

    def head(self, revision: str | None = None) -> str | None:
        """The commit a branch is at, by default the one pushed to; None where nothing was ever committed."""
        info = self._info(revision or self.settings.branch)
        return info.sha if info is not None else None

    def files(self, revision: str | None) -> dict[str, RepoFile]:
        """The files at a revision, by path."""
        from huggingface_hub import RepoFile

        if revision is None:
            return {}
        found = self.call("listing its files", "list_repo_tree", recursive=True, revision=revision)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def doomed(self, paths: Iterable[str]) -> list[str]:
        """Those of the repository's files that the delete patterns name."""
        patterns = [f"{p}*" if p.endswith("/") else p for p in self.settings.delete_patterns]
        found = {path for path in paths for pattern in patterns if fnmatchcase(path, pattern)}
        return sorted(found - {".gitattributes"})  # it says what is stored how

    def upload(self, name: str, file: PushedFile) -> bool:
        """Upload a shard, in pieces and with further attempts as the client does it.

        Returns:
            Whether the Hub keeps it for the commit now; a tiny one it may want inside the commit itself.
        """
        from huggingface_hub.errors import HfHubHTTPError

        settings, where = self.settings, f"{self.where}, file {name}"
        assert file.content is not None
        for attempt in range(1, ATTEMPTS + 1):
            operation = file_operation(name, file.content, file.sha256)
            try:
                self.once(
                    "preupload_lfs_files",
                    additions=[operation],
                    revision=settings.branch,
                    create_pr=settings.create_pr,
                    num_threads=1,
                )
                break
            except Exception as error:
                # A signed address expires; the next attempt gets a new one. What the Hub itself refuses, or the
                # client has tried again already, is final.
                expired = isinstance(error, RuntimeError) and status_of(error.__cause__ or error) in (400, 403)
                if isinstance(error, HfHubHTTPError) or not expired or attempt == ATTEMPTS:
                    raise refusal(where, "upload failed", error, propose=not settings.create_pr) from error
                time.sleep(waiting_time(error, attempt))
        if is_ignored(operation):
            raise TransferError(f"{where}: the repository's .gitignore leaves it out: take that line out of it")
        return is_uploaded(operation)

    def moved(self, expected: str | None, found: str | None) -> TransferError:
        """The refusal of a branch that somebody else has committed to."""
        return TransferError(
            f"{self.where}: somebody committed to it meanwhile: it is at {found}, not at {expected}; look at what "
            f"changed, then give --parent-commit {found} to the same command: it goes on, and commits on top of that"
        )

    def loses(self, file: str) -> TransferError:
        """The refusal of a Hub that does not keep what it is given."""
        return TransferError(f"{self.where}, file {file}: uploaded {UPLOADS} times, and each time the Hub lost it")

    def _whoami(self) -> Mapping[str, Any]:
        limit_waiting(_WAITING)
        try:
            return patiently(self.api.whoami)
        except Exception as error:
            raise self.refusal("asking who is logged in", error) from error

    def _info(self, revision: str) -> ModelInfo | None:
        """The repository at a revision; None where there is none of one of them."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info: ModelInfo = self.call("looking at it", "model_info", revision=revision, timeout=_WAITING[1])
        except TransferError as error:
            if isinstance(error.__cause__, RevisionNotFoundError):
                return None
            if isinstance(error.__cause__, RepositoryNotFoundError):
                self._missing = True
                return None
            raise
        return info

    def _check_new(self, me: Mapping[str, Any]) -> None:
        """Refuse what can be refused of a repository that is still to be made; making it is the full test."""
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise TransferError(f"{self.where}: the token may only read: log in with one that may write")
        if self.settings.parent_commit is not None:
            raise TransferError(f"{self.where}: there is no such repository yet: leave out --parent-commit")
        spaces = [me.get("name"), *(space.get("name") for space in me.get("orgs") or ())]
        known = "orgs" in me and all(isinstance(name, str) for name in spaces)
        if known and self._namespace.casefold() not in [name.casefold() for name in spaces]:
            raise TransferError(
                f"{self.where}: {_NO_SUCH}, and none can be made: no organisation {self._namespace!r} among yours: "
                f"{', '.join(spaces)}"
            )

    @property
    def _namespace(self) -> str:
        return self.settings.repository.partition("/")[0]

    def _make(self) -> None:
        try:
            patiently(lambda: self.once("create_repo", private=self.settings.private, exist_ok=True))
        except Exception as error:
            if status_of(error) == 403:
                raise TransferError(
                    f"{self.where}: {_NO_SUCH}, and no right to make one in {self._namespace!r}: make it in a "
                    "namespace of yours, or use a token that may"
                ) from error
            raise self.refusal("making it", error) from error

    def _check_branch(self) -> None:
        """Refuse a tag, and whatever else the Hub takes for a revision and nobody can commit to."""
        branch = self.settings.branch
        if branch == "main" or branch.startswith("refs/pr/") or self._branch_missing:
            return
        refs = self.call("listing its branches", "list_repo_refs")
        if branch not in [ref.name for ref in refs.branches]:
            raise TransferError(
                f"{self.where}: that is a tag or a commit there, to which nothing can be pushed: give a branch as "
                "--revision, or a new name to make one"
            )

    def _check_right(self) -> None:
        try:
            self.call("checking the right to write", "auth_check", write=True)
        except TransferError as error:
            if status_of(error.__cause__ or error) != 404:  # a Hub that cannot tell: the repository is there
                raise
