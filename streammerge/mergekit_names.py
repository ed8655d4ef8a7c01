"""What recipes of mergekit call things, told to whoever still writes it so; all of it is in docs/from_mergekit.md."""

from __future__ import annotations

from collections.abc import Container

from streammerge.schema import Hint

PAGE = "docs/from_mergekit.md"
_DTYPE = "leave it out: each tensor is written in the base's dtype, and computed in float32 or wider"
_TOKENIZER = "leave it out: the output has the base's tokenizer"
_LAYERS = "layers cannot be put together anew: give whole models under 'models'"

OF_RECIPE = {
    "merge_method": Hint("here it is 'method'", PAGE, "method"),
    "base_model": Hint("here it is 'base'", PAGE, "base"),
} | {
    key: Hint(text, PAGE)
    for key, text in {
        "dtype": _DTYPE,
        "out_dtype": _DTYPE,
        "tokenizer_source": _TOKENIZER,
        "tokenizer": _TOKENIZER,
        "chat_template": _TOKENIZER,
        "slices": _LAYERS,
        "modules": _LAYERS,
        "sources": _LAYERS,
        "layer_range": _LAYERS,
        "weight": "here it is 'coefficient', under 'parameters'",
        "lambda": "here it is 'scale', under 'parameters'",
        "int8_mask": "leave it out: it changed a temporary mask only",
    }.items()
}


def of_parameter(key: str, known: Container[str]) -> str | None:
    """What mergekit's parameter is for a method with the parameters `known`; None where mergekit has none such."""
    text = {
        "weight": _first(known, "coefficient") or "leave it out: this method takes no weights",
        "lambda": _first(known, "scale") or "leave it out, and multiply the coefficients by it",
        "scale": _first(known, "coefficient"),
        "normalize": "leave it out: this method leaves no choice",
        "rescale": "leave it out: this method drops nothing at random",
        "int8_mask": OF_RECIPE["int8_mask"].text,
    }.get(key)
    return text and f"{text}; see {PAGE}"


def _first(known: Container[str], name: str) -> str | None:
    return f"here it is {name!r}" if name in known else None
