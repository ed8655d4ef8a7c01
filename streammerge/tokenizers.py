"""Whether a fine-tuned model's token ids mean what they mean in the base, as far as files on this machine tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.json_text import parse_object
from streammerge.errors import HeaderError, TransferError

TOKENIZER = "tokenizer.json"
_FORMS = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_LONGEST = 40  # characters of a token in a note


def tokenizer_notes(base: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """A note for each fine-tuned model whose `tokenizer.json` gives an id to another token than the base's.

    No error: a chat model may well rename reserved tokens. Only folders are looked at: of a model on the Hub the file
    would have to be fetched for nothing else. Nothing is said of a fine-tuned model without the file, as many are.
    """
    found = []
    for expert in experts:
        if base.revision is not None or expert.revision is not None:
            continue
        theirs = [name for name in _FORMS if expert.files.has(name)]
        if not theirs:
            continue
        if not any(base.files.has(name) for name in _FORMS):
            found.append(f"{expert.id}: brings {theirs[0]}, the base no tokenizer: the output will have none")
        elif TOKENIZER in theirs and base.files.has(TOKENIZER):
            found += _differences(base, expert)
    return found


def _differences(base: Checkpoint, expert: Checkpoint) -> list[str]:
    try:
        raw = [model.files.text(TOKENIZER) for model in (base, expert)]
        if raw[0] == raw[1]:
            return []
        ours, theirs = (_tokens(text, m.files.where(TOKENIZER)) for text, m in zip(raw, (base, expert), strict=True))
    except (HeaderError, TransferError) as error:
        return [f"{expert.id}: its tokenizer was not compared with the base's: {error}"]
    other = [number for number in sorted(theirs) if ours.get(number) != theirs[number]]
    if not other:
        return []
    first = other[0]
    return [
        f"{expert.id}: {len(other)} of {len(theirs)} token ids mean another token than in the base, such as {first}: "
        f"{_told(ours.get(first))} in the base, {_told(theirs[first])} here; the output keeps the base's tokenizer"
    ]


def _tokens(raw: bytes, where: str) -> dict[int, str]:
    """Id -> token of a `tokenizer.json`; raises HeaderError where it has no such list."""
    values = parse_object(raw, where)
    model, added = values.get("model"), values.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[Any]
    if isinstance(vocabulary, dict):
        pairs = [(number, token) for token, number in vocabulary.items()]
    elif isinstance(vocabulary, list):  # Unigram: [token, score] each
        pairs = [
            (number, entry[0] if isinstance(entry, list) and entry else None) for number, entry in enumerate(vocabulary)
        ]
    else:
        raise HeaderError(f"{where}: it has no model.vocab")
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise HeaderError(f"{where}: its added_tokens are no list of tokens")
    pairs += [(entry.get("id"), entry.get("content")) for entry in added]
    if not all(type(number) is int and isinstance(token, str) for number, token in pairs):
        raise HeaderError(f"{where}: its vocabulary is not of tokens and whole numbers")
    return dict(pairs)


def _told(token: str | None) -> str:
    return "nothing" if token is None else repr(token if len(token) <= _LONGEST else token[:_LONGEST] + "...")
