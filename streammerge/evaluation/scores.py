"""From graded responses to the numbers of a task, and from tasks to averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.evaluation.harness import Solved

AVERAGED = ("accuracy", "mean_length", "truncated")


def task_scores(solved: Sequence[Solved]) -> dict[str, Any]:
    """The numbers of one task.

    accuracy         share of the problems whose vote is right; with one response to each, whose response is
    stderr           sqrt(p (1 - p) / (n - 1)), p the accuracy of n problems; None for a single problem
    sample_accuracy  share of all responses that are right
    mean_length      mean of all responses' lengths in tokens; one that was cut counts with what there is of it
    truncated        share of all responses that did not end by themselves
    no_answer        share of all responses in which no answer was found
    """
    responses = [response for problem in solved for response in problem.responses]
    count, right = len(solved), sum(problem.right for problem in solved)
    share = right / count
    return {
        "accuracy": share,
        "stderr": math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None,
        "sample_accuracy": _mean(response.right for response in responses),
        "mean_length": _mean(response.tokens for response in responses),
        "truncated": _mean(not response.ended for response in responses),
        "no_answer": _mean(response.answer is None for response in responses),
        "problems": count,
        "samples": len(responses) // count,
    }


def averages(tasks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Unweighted means over the tasks, as the papers have them: a task of 30 problems counts as one of 3000.

    `stderr` is the accuracy's, from those of the tasks, whose problems have nothing to do with each other; None where
    one of them has none.
    """
    tasks = list(tasks)
    errors = [scores["stderr"] for scores in tasks]
    known = None not in errors
    return {
        **{key: _mean(scores[key] for scores in tasks) for key in AVERAGED},
        "stderr": math.hypot(*errors) / len(errors) if known else None,
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
