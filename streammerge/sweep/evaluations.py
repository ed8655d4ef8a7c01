"""What a sweep can score a merged model by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from streammerge import mini_l2s
from streammerge.errors import CheckpointError, RecipeError
from streammerge.schema import suggest


class Evaluate(Protocol):
    """Scores the model in a folder.

    Returns:
        At least `accuracy` (0 to 1) and `mean_length` (tokens of an answer); plain values, kept as they are.
    """

    def __call__(self, folder: Path, *, limit: int | None = None, progress: bool = True) -> Mapping[str, Any]: ...


def _mini_l2s(folder: Path, *, limit: int | None = None, progress: bool = True) -> Mapping[str, Any]:
    return mini_l2s.score(folder, limit=limit, progress=progress)


EVALUATIONS: dict[str, Evaluate] = {"mini_l2s": _mini_l2s}


def find_evaluation(name: str) -> Evaluate:
    """The evaluation of that name.

    Raises:
        RecipeError: there is none.
    """
    key = name.replace("-", "_")
    if key not in EVALUATIONS:
        raise RecipeError(f"--eval {name}: there is no such evaluation: {suggest(key, EVALUATIONS)}")
    return EVALUATIONS[key]


def mini_pair() -> dict[str, Any]:
    """The recipe of the pair that comes with the package."""
    base, long = mini_l2s.pair()
    return {"base": str(base), "models": [str(long)]}


def scored(evaluate: Evaluate, folder: Path, limit: int | None, progress: bool) -> dict[str, Any]:
    """The scores of the model in a folder.

    Raises:
        CheckpointError: an accuracy or a length that is no number.
    """
    scores = dict(evaluate(folder, limit=limit, progress=progress))
    for key in ("accuracy", "mean_length"):
        value = scores.get(key)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"model {folder}: its evaluation gives {key} {value!r}, which is no number")
    return scores
