"""The inputs on which the Fisher is measured."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher.store import FisherSettings


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
    from transformers import AutoTokenizer

    path = settings.probe_text or ""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"--probe-text {path}: {reason}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files may break transformers anywhere
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model {base.id}: its tokenizer, for --probe-text, cannot be loaded: {reason}"
        ) from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((base.folder / file).is_file() for file in files):  # then transformers makes an empty one
        raise CheckpointError(
            f"model {base.id}: it brings no tokenizer, which --probe-text needs: {min(files)} or alike"
        )
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
    needed = settings.samples * settings.length
    if len(ids) < needed:
        raise RecipeError(
            f"--probe-text {path}: {len(ids)} tokens, and {settings.samples} samples of {settings.length} take "
            f"{needed}: give a longer text, or fewer samples"
        )
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"model {base.id}: its tokenizer gives the id {int(ids.max())}, it has {vocab_size} tokens"
        )
    starts = [
        sample * (len(ids) - settings.length) // max(settings.samples - 1, 1) for sample in range(settings.samples)
    ]
    return torch.stack([ids[start : start + settings.length] for start in starts])
