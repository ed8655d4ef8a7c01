"""Models whose every response is known beforehand: the next character depends on the last one alone.

A Llama of one block that adds nothing: the embedding of a character goes to the head as it is, and the head's logits
are those of the characters that may follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from streammerge.progress import quiet_transformers

END, STOP = "<|endoftext|>", "<|im_end|>"
SPECIAL = ("<pad>", "<unk>", "<bos>", END, "<|im_start|>", STOP)
BOXED_7 = {"\n": "\\", "\\": "b", "b": "o", "o": "x", "x": "e", "e": "d", "d": "{", "{": "7", "7": "}", "}": STOP}
"""After the prompt's last line end: \\boxed{7}, and the end of the turn."""


def make_tokenizer(bos: bool = False) -> Any:
    """One token per character; with `bos`, one more before every text."""
    words = [*SPECIAL, *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=END
    )


def make_chain_model(folder: Path, follow: Mapping[str, str | list[str]], *, bos: bool = False, **config: Any) -> Path:
    """Save a model and its tokenizer.

    Args:
        folder: where.
        follow: what follows a token; of several, each with nearly the same probability, the first with the highest.
            The end token follows all others.
        bos: have the tokenizer put a token before every text.
        config: of the Llama.
    """
    tokenizer = make_tokenizer(bos)
    size = len(tokenizer)
    settings = {
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for id in range(size):
            token = tokenizer.convert_ids_to_tokens(id)
            after = follow.get(token, END)
            for place, word in enumerate(after if isinstance(after, list) else [after]):
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(word), id] = 10 - place / 10_000
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
