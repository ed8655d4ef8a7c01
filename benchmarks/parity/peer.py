"""Merges with mergekit, in mergekit's own environment; `environment.py` starts it and talks to it.

One JSON line on standard input per merge: {"config", "out", "seed"}, which are what `mergekit-yaml` would read from
its YAML file, a folder, and the random seed or null. mergekit's own pipeline plans, executes and writes it; one process
for all, because importing takes longer than merging. One JSON line on standard output per answer: first the versions
of the packages, then for every merge {"error": text or null}.
"""

import json
import os
import platform
import sys
from importlib.metadata import version
from typing import Any

PACKAGES = ("mergekit", "torch", "transformers", "accelerate", "safetensors", "pydantic", "numpy")


def run(job: dict[str, Any]) -> str | None:
    """Merge; what went wrong, in one line."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(random_seed=job["seed"], quiet=True, copy_tokenizer=False, write_model_card=False)
    try:
        run_merge(MergeConfiguration.model_validate(job["config"]), job["out"], options)
    except Exception as error:  # whatever it raises is its answer
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"python": platform.python_version(), **{package: version(package) for package in PACKAGES}})
    for line in sys.stdin:
        answer({"error": run(json.loads(line))})


if __name__ == "__main__":
    main()
