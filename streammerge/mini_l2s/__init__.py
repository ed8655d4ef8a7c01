"""A small real long-to-short pair: a terse base, the long model fine-tuned from it, and what scores them.

    from streammerge import mini_l2s

    base, long = mini_l2s.pair()
    mini_l2s.score(long)["accuracy"]

Both answer arithmetic word problems of two to five steps. How they were trained: benchmarks/mini_l2s/train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge.mini_l2s.problems import Split


def pair() -> tuple[Path, Path]:
    """The folders of the base and of the long model, which come with the package. They must not be written to."""
    folder = Path(__file__).parent / "pair"
    return folder / "base", folder / "long"


def score(
    folder: Path | str, *, limit: int | None = None, split: Split = "heldout", progress: bool = True
) -> dict[str, Any]:
    """Let a model answer problems greedily, and grade the answers.

    Args:
        folder: a checkpoint of the pair's shape and tokenizer, such as a merge of the two.
        limit: only the first so many of the 250 problems.
        split: "heldout", which no training draws; or "validation", on which whatever is tuned should be.
        progress: show a progress bar on standard error.

    Returns:
        `accuracy` (share of right answers, 0 to 1), `mean_length` (of the responses, in tokens of the folder's
        tokenizer, up to and without the end token), `truncated` (share without an end token after 256 tokens),
        `problems` (how many), `seconds` (loading included).

    Raises:
        OSError: the folder holds no model that transformers loads.
        CheckpointError: nor a tokenizer.
    """
    from streammerge.mini_l2s.scoring import score_model

    return score_model(Path(folder), limit=limit, split=split, progress=progress)
