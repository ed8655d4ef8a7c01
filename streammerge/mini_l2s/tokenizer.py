"""One token per word: every number from 0 to LARGEST is one, as is every sign."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from streammerge.mini_l2s.problems import CLAUSES, LARGEST, ORDINALS, PEOPLE, THINGS

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
_QUESTION = ["has", ",", ".", "how", "many", "?"]
_RESPONSE = ["given", "+", "-", "*", "/", "=", "check", "ok", "again", "so", "answer"]


def vocabulary() -> dict[str, int]:
    """Every word of the questions and responses with its token id, the special ones first."""
    told = [word for clause in CLAUSES.values() for word in clause.split() if word != "{n}"]
    numbers = map(str, range(LARGEST + 1))
    words = dict.fromkeys([PAD, END, UNKNOWN, *numbers, *PEOPLE, *THINGS, *_QUESTION, *ORDINALS, *told, *_RESPONSE])
    return {word: index for index, word in enumerate(words)}


def make_tokenizer() -> Any:
    """The tokenizer of both models, as transformers saves and loads it; nothing is put before a text."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
