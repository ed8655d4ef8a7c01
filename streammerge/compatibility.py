"""Whether fine-tuned models can be merged into a base, decided from headers and configs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.header import DTYPES, TensorInfo
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError

# Two models that differ in one of these compute different functions of the same weights.
_STRUCTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
)
# These may differ between a base and its fine-tune; the output keeps the base's, which is worth knowing.
_WORTH_A_NOTE = ("max_position_embeddings", "rope_theta", "rope_parameters", "rope_scaling", "sliding_window")

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|quant_map|\w+_blocks)$"
)


@dataclass
class Match:
    """How one fine-tuned model's tensors map onto the base's names.

    Attributes:
        tensors: the tensor to read for each base name.
        notes: what was done with tensors that have no counterpart.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def refuse_quantised(model: Checkpoint) -> None:
    """Raise CheckpointError for a quantised or packed checkpoint, naming what shows it."""
    method = _setting(model, "quantization_config")
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, Mapping) else "unknown"
        raise CheckpointError(
            f"model {model.id}, file config.json: quantised ({name}); averaging packed weights would destroy them: "
            "dequantise it first, or take the 16-bit original"
        )
    for name, info in model.tensors.items():
        if _QUANTISED.search(name) or DTYPES[info.dtype].torch_name is None or info.dtype == "F8_E8M0":
            raise CheckpointError(
                f"model {model.id}, file {info.file}: tensor {name!r} ({info.dtype}) is part of a quantised weight; "
                "dequantise the model first, or take the 16-bit original"
            )


def match_experts(
    base: Checkpoint, experts: Sequence[Checkpoint], verdict: str = "these models cannot be merged into"
) -> list[Match]:
    """Match every fine-tuned model to the base; `verdict` begins the message where one does not match.

    Raises:
        IncompatibleCheckpointsError: every difference that would make the merge wrong, of all models at once.
    """
    matches, mismatches = [], []
    for expert in experts:
        match = Match()
        problems = [*_config_mismatches(base, expert), *_match_tensors(base, expert, match)]
        mismatches += [f"{expert.id}: {problem}" for problem in problems]
        match.notes += [f"{expert.id}: {note}" for note in _config_notes(base, expert)]
        matches.append(match)
    if mismatches:
        raise IncompatibleCheckpointsError(f"{verdict} {base.id}:", mismatches)
    return matches


def same_model_notes(base: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """A note for each fine-tuned model that is the base or one given before, by its folder or commit alone."""
    found = []
    for number, expert in enumerate(experts):
        if _is_same(base, expert):
            found.append(
                f"{expert.id}: is the base itself: its task vector is 0, and a mean of all models counts it twice"
            )
        elif any(_is_same(other, expert) for other in experts[:number]):
            found.append(f"{expert.id}: is given more than once, and counts each time")
    return found


def _is_same(one: Checkpoint, other: Checkpoint) -> bool:
    if one.folder is not None and other.folder is not None:
        return one.folder.resolve() == other.folder.resolve()
    return one.revision is not None and (one.id, one.revision) == (other.id, other.revision)


def _config_mismatches(base: Checkpoint, expert: Checkpoint) -> list[str]:
    found = []
    for key in _STRUCTURE:
        ours, theirs = _setting(base, key), _setting(expert, key)
        if ours is not None and theirs is not None and ours != theirs:
            found.append(f"config {key} is {theirs!r}, in the base {ours!r}")
    return found


def _config_notes(base: Checkpoint, expert: Checkpoint) -> list[str]:
    found = []
    for key in _WORTH_A_NOTE:
        ours, theirs = _setting(base, key), _setting(expert, key)
        if ours != theirs and ours is not None and theirs is not None:
            found.append(f"config {key} is {theirs!r}; the output keeps the base's {ours!r}")
    return found


def _setting(model: Checkpoint, key: str) -> Any:
    text = model.config.get("text_config")
    nested = text.get(key) if isinstance(text, Mapping) else None
    return nested if nested is not None else model.config.get(key)


def _match_tensors(base: Checkpoint, expert: Checkpoint, match: Match) -> list[str]:
    problems = []
    for name, info in base.tensors.items():
        theirs = expert.tensors.get(name) or _tied_head(name, expert, match)
        if theirs is None and _BUFFERS.search(name):
            match.notes.append(
                f"{expert.id}: has no {name!r}, a buffer that models compute themselves; kept the base's"
            )
            continue
        if theirs is None:
            problems.append(f"tensor {name!r} is missing")
            continue
        if theirs.shape != info.shape:
            problems.append(f"tensor {name!r} is {list(theirs.shape)}, in the base {list(info.shape)}")
        elif theirs.floating != info.floating or (not info.floating and theirs.dtype != info.dtype):
            problems.append(f"tensor {name!r} is {theirs.dtype}, in the base {info.dtype}")
        match.tensors[name] = theirs
    for name, info in expert.tensors.items():
        if name not in base.tensors:
            why = _why_left_out(name, info, base)
            if why is None:
                problems.append(f"tensor {name!r} has no counterpart in the base")
            else:
                match.notes.append(f"{expert.id}: tensor {name!r} was left out: {why}")
    return problems


def _tied_head(name: str, expert: Checkpoint, match: Match) -> TensorInfo | None:
    """The embedding of a fine-tuned model that ties its head, where the base stores the head separately."""
    if name != HEAD or not _setting(expert, "tie_word_embeddings"):
        return None
    embedding = _embedding(expert)
    if embedding is not None:
        match.notes.append(
            f"{expert.id}: ties {HEAD!r} to {embedding.name!r}; that tensor was used for the base's head"
        )
    return embedding


def _why_left_out(name: str, info: TensorInfo, base: Checkpoint) -> str | None:
    """Why a fine-tuned model's extra tensor may be left out; None: it may not."""
    if _BUFFERS.search(name):
        return "a buffer that the model computes itself"
    embedding = _embedding(base)
    tied = name == HEAD and _setting(base, "tie_word_embeddings") is not False  # some families leave it out
    if tied and embedding is not None and info.shape == embedding.shape:
        return f"the base ties its head to {embedding.name!r}, which serves as the head of the merged model too"
    return None


def embedding_and_head(model: Checkpoint) -> tuple[TensorInfo | None, TensorInfo | None]:
    """The token embeddings and the head, as far as names tell; the embeddings are both where the model ties them."""
    embedding, head = _embedding(model), model.tensors.get(HEAD)
    return embedding, embedding if head is None or _setting(model, "tie_word_embeddings") else head


def _embedding(model: Checkpoint) -> TensorInfo | None:
    return next((info for name, info in model.tensors.items() if name.endswith(_EMBEDDINGS)), None)
