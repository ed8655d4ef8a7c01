"""The inputs on which the Fisher is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.store import FisherSettings

_PART = 1 << 16  # characters
_TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # the files that make one; patterns


def probe_tokens(base: Checkpoint, vocab_size: int, settings: FisherSettings) -> Tensor:
    """Token ids [samples, length], int64, as the settings ask for: random, or from a text."""
    if settings.probe_text is None:
        return random_tokens(vocab_size, settings.samples, settings.length, settings.seed)
    return text_tokens(base, vocab_size, settings)


def random_tokens(vocab_size: int, samples: int, length: int, seed: int) -> Tensor:
    """Token ids drawn uniformly from `range(vocab_size)`, without BOS or any other special token.

    One draw of shape [samples, length], int64, from a CPU generator, so that every device sees the same ids.
    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, vocab_size, (samples, length), generator=generator, dtype=torch.int64)


def text_tokens(base: Checkpoint, vocab_size: int, settings: FisherSettings) -> Tensor:
    """Windows of `length` tokens, evenly spread over a text that the base's own tokenizer reads, without overlap.

    Raises:
        RecipeError: the file cannot be read, or is too short.
        CheckpointError: the base brings no tokenizer, or one that knows more tokens than the model.
    """
    path = settings.probe_text or ""
    ids = encode(base, vocab_size, read_text(path, "--probe-text"), "--probe-text")
    return windows(ids, settings.samples, settings.length, f"--probe-text {path}")


def read_text(path: str, option: str) -> str:
    """A UTF-8 file, named by an option."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"{option} {path}: {reason}") from None


def encode(base: Checkpoint, vocab_size: int, text: str, option: str) -> Tensor:
    """The text's token ids by the base's own tokenizer, without special tokens: [tokens], int64.

    A long text is read some lines at a time: a tokenizer takes a hundred times the memory of its text.
    """
    from transformers import AutoTokenizer

    folder = base.files.folder_with(*_TOKENIZER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files may break transformers anywhere
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"model {base.id}: its tokenizer, for {option}, cannot be loaded: {reason}") from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / file).is_file() for file in files):  # then transformers makes an empty one
        raise CheckpointError(f"model {base.id}: it brings no tokenizer, which {option} needs: {min(files)} or alike")
    ids = torch.cat(
        [torch.tensor(tokenizer.encode(part, add_special_tokens=False), dtype=torch.int64) for part in _parts(text)]
    )
    if len(ids) and int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"model {base.id}: its tokenizer gives the id {int(ids.max())}, it has {vocab_size} tokens"
        )
    return ids


def _parts(text: str) -> Iterator[str]:
    """The text in pieces of at least 64 thousand characters that end with a line; one where there are no lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PART) + 1 or len(text)
        yield text[start:end]
        start = end
    if not text:
        yield text


def windows(ids: Tensor, samples: int, length: int, what: str) -> Tensor:
    """[samples, length] of the ids [tokens], evenly spread, without overlap.

    Raises:
        RecipeError: there are too few.
    """
    needed = samples * length
    if len(ids) < needed:
        raise RecipeError(
            f"{what}: {len(ids)} tokens, and {samples} samples of {length} take {needed}: give a longer text, or fewer "
            "samples"
        )
    starts = [sample * (len(ids) - length) // max(samples - 1, 1) for sample in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts])
