"""The manifest of a finished merge, read back."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.checkpoints.json_text import parse_object
from streammerge.errors import CheckpointError, HeaderError
from streammerge.report import seal_of
from streammerge.schema import FileName


class _Part(BaseModel):
    """Part of a manifest, as far as it is compared; the rest is what happened, which no later look can tell."""

    model_config = ConfigDict(strict=True, frozen=True)


class TensorEntry(_Part):
    dtype: str
    shape: list[int]


class FileEntry(_Part):
    bytes: int
    sha256: str


class _Recipe(_Part):
    allow_nonfinite: bool
    method: str


class Manifest(_Part):
    """A manifest. The last two are missing in those of before they were written; of one alone, the other is lost.

    Attributes:
        text: the whole file.
        sha256: of its other bytes.
        other_files: what is said of every file beside the shards and the manifest itself.
    """

    text: bytes
    recipe: _Recipe
    tensors: dict[str, TensorEntry] = Field(min_length=1)
    shards: dict[FileName, FileEntry] = Field(min_length=1)
    files: list[FileName]
    other_files: dict[FileName, FileEntry] | None = None
    sha256: str | None = None

    @cached_property
    def values(self) -> dict[str, Any]:
        """All of it, as plain values."""
        values: dict[str, Any] = json.loads(self.text)
        return values

    @property
    def is_sealed(self) -> bool:
        """Whether it says what its own bytes and those of the other files are."""
        return self.sha256 is not None or self.other_files is not None

    def problems(self) -> list[str]:
        """What is wrong with it by itself."""
        if self.is_sealed and (self.other_files is None or self.sha256 != seal_of(self.text)):
            return [f"file {MANIFEST_FILE} differs from its own SHA-256"]
        return []


def read_manifest(folder: Path) -> Manifest:
    """Read and check the form of the manifest in an output folder.

    Raises:
        CheckpointError: there is none, or it is none.
    """
    path = folder / MANIFEST_FILE
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name the system cannot hold
        raise CheckpointError(f"{folder}: there is no {MANIFEST_FILE}, so this is no finished merge of streammerge")
    try:
        text = path.read_bytes()
        return Manifest.model_validate({**parse_object(text, str(path)), "text": text})
    except OSError as error:
        raise CheckpointError(f"{folder}, file {MANIFEST_FILE}: cannot be read: {error.strerror}") from error
    except (ValueError, HeaderError):
        raise CheckpointError(f"{folder}, file {MANIFEST_FILE}: damaged: not a manifest of streammerge") from None
