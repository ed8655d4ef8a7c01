"""A repository of the loopback Hub: commits of {path: file}, branches, tags, pull requests; no bytes, no HTTP."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from streammerge.testing.store import File

Files = Mapping[str, File]


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Files


@dataclass
class Discussion:
    """A discussion, or a pull request: a branch `refs/pr/{num}` that left `base` at the commit `fork`."""

    num: int
    title: str
    description: str
    author: str
    created: str
    status: str
    base: str | None = None
    fork: str | None = None
    merge_commit: str | None = None

    @property
    def is_pull_request(self) -> bool:
        return self.base is not None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repository:
    """A model repository.

    Attributes:
        private: only who may write to its namespace sees it.
        gated: its files are refused to all but `granted`.
        granted: names of users with access to a gated repository.
        branches, tags, pulls: commit by name; a pull's name is "refs/pr/N".
        objects: SHA-256 of the LFS objects uploaded to it, committed or not.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    created: str = field(default_factory=lambda: now())

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request, full ref or commit names."""
        heads = re.sub("^refs/heads/", "", revision)
        for names in (self.branches, self.tags, self.pulls):
            if heads in names:
                return names[heads]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> Files:
        """The files of a revision, by path."""
        return self.commits[self.branches.get(revision) or self.commit_of(revision) or revision].files

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """A revision's commits, newest first."""
        oid = self.commit_of(revision)
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent

    def commit(self, ref: str, files: Files, title: str, description: str = "", author: str = "me") -> Commit:
        """Make these files the next state of a branch (created if need be) or of a pull request."""
        heads = self.pulls if ref.startswith("refs/pr/") else self.branches
        parent = heads.get(ref)
        content = json.dumps(
            [parent, title, description, len(self.commits), sorted((p, f.oid) for p, f in files.items())]
        )
        oid = hashlib.sha1(f"{self.id} {content}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, author, now(), dict(files))
        heads[ref] = oid
        return self.commits[oid]

    def forget_uncommitted(self) -> None:
        """Lose the objects that no commit needs, as the Hub does after a while."""
        self.objects &= {file.sha256 for commit in self.commits.values() for file in commit.files.values()}

    def discuss(self, title: str, description: str, author: str, base: str | None = None) -> Discussion:
        """Open a discussion, or with a base branch a draft pull request."""
        num = next(n for n in itertools.count(1) if n not in self.discussions)
        status = "open" if base is None else "draft"
        discussion = Discussion(num, title, description, author, now(), status, base)
        if base is not None:
            discussion.fork = self.pulls[discussion.ref] = self.branches[base]
        self.discussions[num] = discussion
        return discussion

    def merge(self, pull: Discussion, author: str) -> Commit:
        """Bring a pull request's changes into its base branch, whatever else has changed there."""
        assert pull.base is not None
        assert pull.fork is not None
        before, after = self.files(pull.fork), self.files(pull.ref)
        files = {path: file for path, file in self.files(pull.base).items() if path in after or path not in before}
        files |= {path: file for path, file in after.items() if before.get(path) != file}
        merged = self.commit(pull.base, files, f"{pull.title} (#{pull.num})", pull.description, author)
        pull.status, pull.merge_commit = "merged", merged.oid
        return merged


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
