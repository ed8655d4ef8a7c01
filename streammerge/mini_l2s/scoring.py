"""Greedy answers of a model to problems, graded and counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from streammerge.errors import CheckpointError
from streammerge.mini_l2s.grade import is_right
from streammerge.mini_l2s.problems import Problem, Split, scored_problems
from streammerge.progress import progress_bar, quiet_transformers
from streammerge.workers import single_threaded_torch

MAX_NEW_TOKENS = 256
"""A right response in the longest style takes at most 200."""

BATCH = 125


def score_model(
    folder: Path, *, limit: int | None = None, split: Split = "heldout", progress: bool = True
) -> dict[str, Any]:
    """See `streammerge.mini_l2s.score`."""
    started = time.perf_counter()
    asked = scored_problems(limit, split)
    # Matrices this small lose more by waiting for a second thread than they gain from it.
    with quiet_transformers(), single_threaded_torch():
        tokenizer = _tokenizer(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        result = score_responses(tokenizer, model, asked, label=folder.name, progress=progress)
    return {**result, "seconds": round(time.perf_counter() - started, 3)}


def _tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a tokenizer's files, or their absence, may break transformers anywhere
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model {folder}: its tokenizer, to be scored with, cannot be loaded: {reason}"
        ) from error


def score_responses(
    tokenizer: Any, model: Any, asked: Sequence[Problem], *, label: str, progress: bool
) -> dict[str, Any]:
    """Accuracy, mean length and truncated share over these problems; the model is in memory."""
    responses = respond(tokenizer, model, [problem.question for problem in asked], label=label, progress=progress)
    right = sum(is_right(text, problem.answer) for problem, (text, _, _) in zip(asked, responses, strict=True))
    return {
        "accuracy": right / len(asked),
        "mean_length": sum(length for _, length, _ in responses) / len(asked),
        "truncated": sum(not ended for _, _, ended in responses) / len(asked),
        "problems": len(asked),
    }


def respond(
    tokenizer: Any, model: Any, questions: Sequence[str], *, label: str = "", progress: bool = False
) -> list[tuple[str, int, bool]]:
    """To every question the greedy response's text, its length in tokens without the end token, and whether it ended.

    Questions of like length go together, padded on the left; the order of the result is that of the questions.
    """
    tokenizer.padding_side = "left"
    model.eval()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].split()))
    responses: dict[int, tuple[str, int, bool]] = {}
    with progress_bar(len(questions), f"answers of {label}", "problem", progress) as bar:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            prompts = tokenizer([questions[index] for index in chosen], return_tensors="pt", padding=True)
            output = model.generate(
                input_ids=prompts.input_ids,
                attention_mask=prompts.attention_mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for index, ids in zip(chosen, output[:, prompts.input_ids.shape[1] :].tolist(), strict=True):
                ended = tokenizer.eos_token_id in ids
                response = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
                responses[index] = (tokenizer.decode(response), len(response), ended)
            bar.update(len(chosen))
    return [responses[index] for index in range(len(questions))]
