"""Every error streammerge raises on purpose. Catch `StreammergeError` to catch them all.

    StreammergeError
     +-- RecipeError (ValueError)           the request: an unknown method, key, option or value
     +-- CheckpointError                    the data of one model
     |    +-- HeaderError                   a safetensors header or an index that breaks the format
     |    +-- MissingTensorError (KeyError) a tensor that should be there and is not
     |    +-- IncompatibleCheckpointsError  models that cannot be merged: every mismatch, not the first
     +-- MemoryBudgetError                  --max-ram too small, with the smallest that works
     +-- TransferError (OSError)            bytes that could not be read, written, downloaded or uploaded
     +-- OutputExistsError                  an output folder that holds something else

Messages name the model, the file and the tensor, and the option or call that mends it. Names come from strangers: what
cannot be printed is written as its escape in every message, so that none drives a terminal or forges a line.
"""

from collections.abc import Sequence
from typing import Self

from streammerge.text import visible


class StreammergeError(Exception):
    """Base class of all errors raised on purpose. The message is one line, see `visible`."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class RecipeError(StreammergeError, ValueError):
    """The recipe asks for something that does not exist or makes no sense."""


class CheckpointError(StreammergeError):
    """A model's files cannot be used as they are."""


class HeaderError(CheckpointError):
    """A safetensors header or an index file is malformed."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor is not in the checkpoint it is asked of."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message, quotes and all.
        return Exception.__str__(self)


class IncompatibleCheckpointsError(CheckpointError):
    """Checkpoints that cannot be merged with one another.

    Args:
        summary: one line saying what was compared.
        mismatches: every difference found, one line each.
    """

    def __init__(self, summary: str, mismatches: Sequence[str]) -> None:
        self.mismatches = tuple(mismatches)
        separator = " " if len(self.mismatches) == 1 else "\n  - "
        Exception.__init__(self, separator.join(visible(line) for line in [summary, *self.mismatches]))
        self._summary = summary

    def __reduce__(self) -> tuple[type[Self], tuple[str, Sequence[str]]]:
        return type(self), (self._summary, self.mismatches)


class MemoryBudgetError(StreammergeError):
    """The memory budget cannot hold the smallest piece of work."""


class TransferError(StreammergeError, OSError):
    """Bytes could not be moved: disk or network."""


class OutputExistsError(StreammergeError):
    """The output folder is not free to be written."""
