"""The papers' evaluation: a thin layer over lm-evaluation-harness, graded by math-verify. See docs/eval.md."""

from streammerge.evaluation.compare import compare
from streammerge.evaluation.run import evaluate

__all__ = ["compare", "evaluate"]
