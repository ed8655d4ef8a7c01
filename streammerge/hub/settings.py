"""Where a model is pushed to, and how."""

import re

from pydantic import Field, field_validator, model_validator

from streammerge.branches import branch_flaw
from streammerge.schema import Strict

_REPOSITORY = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")
_LONGEST = 96  # characters of a part of a name


class PushSettings(Strict):
    """A push. `None` means: whatever the Hub does by default."""

    repository: str = Field(description="repository on the Hub, org/name; made if there is none")
    private: bool | None = Field(None, description="visibility of a repository that is made")
    revision: str | None = Field(None, description="branch to push to, made if there is none; main")
    create_pr: bool = Field(False, description="open a pull request with the model instead of changing the branch")
    commit_message: str | None = Field(None, description="message of the commit, or title of the pull request")
    delete_patterns: list[str] = Field([], description="glob of other files to delete in the same commit; repeat it")
    parent_commit: str | None = Field(None, description="commit that the branch must be at, all 40 digits")

    @field_validator("repository")
    @classmethod
    def _check_repository(cls, value: str) -> str:
        if longest := max((part for part in value.split("/") if len(part) > _LONGEST), key=len, default=""):
            raise ValueError(f"a name may have {_LONGEST} characters, and one has {len(longest)}")
        if not _REPOSITORY.fullmatch(value) or ".." in value or "--" in value or value.endswith(".git"):
            raise ValueError(
                "must be a repository on the Hub, org/name: letters, digits, -, _ and ., a letter or digit at "
                "either end, without -- and .., not ending with .git"
            )
        return value

    @field_validator("revision")
    @classmethod
    def _check_branch(cls, value: str | None) -> str | None:
        if value is None or _PULL_REQUEST.fullmatch(value):
            return value
        if flaw := branch_flaw(value):
            raise ValueError(f"cannot be a branch: {flaw}")
        if _COMMIT.fullmatch(value):
            raise ValueError("must be a branch: to a commit nothing can be pushed")
        if value.startswith("refs/"):
            raise ValueError("must be a branch by its plain name, or refs/pr/N")
        return value

    @field_validator("parent_commit")
    @classmethod
    def _check_parent(cls, value: str | None) -> str | None:
        if value is not None and not _COMMIT.fullmatch(value):
            raise ValueError("must be the 40 hexadecimal digits of a commit")
        return value

    @field_validator("commit_message")
    @classmethod
    def _check_message(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("delete_patterns")
    @classmethod
    def _check_patterns(cls, value: list[str]) -> list[str]:
        if not all(pattern.strip() for pattern in value):
            raise ValueError("a pattern must not be empty")
        return value

    @model_validator(mode="after")
    def _check_pull_request(self) -> "PushSettings":
        if self.create_pr and self.parent_commit:
            raise ValueError("parent_commit does not go with create_pr: a pull request may lag behind its branch")
        return self

    @property
    def branch(self) -> str:
        return self.revision or "main"

    @property
    def where(self) -> str:
        """How messages name the target."""
        return self.repository + (f"@{self.revision}" if self.revision else "")
