"""The files of one model by name, wherever they lie; here those of a local folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.json_text import MAX_TEXT_BYTES, parse_object
from streammerge.checkpoints.source import LocalFile, Source
from streammerge.errors import CheckpointError, HeaderError, TransferError
from streammerge.names import stays_inside


class Files(ABC):
    """A model's files. Names are relative to the model, with slashes.

    Attributes:
        id: how the user named the model.
        folder: the local folder they lie in; None where they come from the Hub.
    """

    id: str
    folder: Path | None = None

    @property
    def transferred(self) -> int:
        """Bytes that have come over the network so far."""
        return 0

    def where(self, name: str) -> str:
        """How messages name a file."""
        return f"model {self.id}, file {name}"

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a regular file of that name."""

    @abstractmethod
    def top(self) -> list[str]:
        """The sorted names without a slash, whatever they are names of."""

    @abstractmethod
    def names(self) -> list[str]:
        """All names, sorted."""

    @abstractmethod
    def text(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            HeaderError: it is too large to be one.
            TransferError: it cannot be read.
        """

    def json(self, name: str, required: bool = True) -> dict[str, Any]:
        """The object that a small JSON file holds; {} where a file that is not required is missing.

        Raises:
            CheckpointError: it is missing.
            HeaderError: it is malformed, or too large.
            TransferError: it cannot be read.
        """
        where = self.where(name)
        if not self.has(name):
            if not required:
                return {}
            raise CheckpointError(f"{where}: missing: is this a model folder?")
        return parse_object(self.text(name), where)

    @abstractmethod
    def open(self, names: Mapping[str, int]) -> dict[str, Source]:
        """Open weight files; names -> about how many bytes of it are header, 0 where that is not known."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """A local file with the content of a non-weight file, as long as the model is open."""

    @abstractmethod
    def folder_with(self, *patterns: str) -> Path:
        """A local folder in which those of the top files are that match one of the patterns, and maybe others."""

    @abstractmethod
    def length(self, name: str) -> int:
        """The file's size in bytes; 0 where the Hub does not tell it."""

    def leads_out(self, name: str) -> bool:
        """Whether it is a link to a file that is none of the model's."""
        return False

    def size(self, name: str) -> int:
        """How many bytes travel when `path` is asked for the file."""
        return 0

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Forget temporary files, and let go of connections."""


class LocalFolder(Files):
    """A folder on this machine.

    Raises:
        CheckpointError: there is none.
    """

    folder: Path

    def __init__(self, folder: Path, id: str) -> None:
        self.folder, self.id = folder, id
        if not folder.is_dir():
            raise CheckpointError(f"model {id}: there is no folder {folder}")

    def has(self, name: str) -> bool:
        return os.path.isfile(self.folder / name)  # unlike Path.is_file, False for a name the system cannot hold

    def top(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def names(self) -> list[str]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in paths]

    def length(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise TransferError(f"{self.where(name)}: cannot be read: {error.strerror}") from error

    def leads_out(self, name: str) -> bool:
        return not stays_inside(self.folder, name)

    def text(self, name: str) -> bytes:
        path, where = self.folder / name, self.where(name)
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise HeaderError(f"{where}: larger than {MAX_TEXT_BYTES} bytes")
        try:
            return disk.read_file(path)
        except OSError as error:
            raise TransferError(f"{where}: cannot be read: {error.strerror}") from error

    def open(self, names: Mapping[str, int]) -> dict[str, Source]:
        opened: dict[str, Source] = {}
        try:
            for name in names:
                opened[name] = LocalFile(self.folder / name, self.where(name))
        except BaseException:
            for source in opened.values():
                source.close()
            raise
        return opened

    def path(self, name: str) -> Path:
        return self.folder / name

    def folder_with(self, *patterns: str) -> Path:
        return self.folder
