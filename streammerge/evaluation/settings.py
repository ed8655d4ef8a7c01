"""What is evaluated, and how responses are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from streammerge.errors import RecipeError
from streammerge.schema import Strict, suggest

PAPER_TASKS = ("gsm8k", "math500", "minerva_math", "olympiadbench", "college_math", "aime24")
TASKS = (*PAPER_TASKS, "mini_l2s")
"""Each is a file in `tasks/`."""


class EvaluationSettings(Strict):
    """How models are evaluated. By default as in the papers: the six tasks, greedy, one response to each problem."""

    tasks: tuple[str, ...] = Field(PAPER_TASKS, min_length=1, description="tasks, separated by commas")
    data: Path | None = Field(
        None, description="folder of JSONL files, TASK.jsonl or TASK/test.jsonl; without it, from the Hub"
    )
    limit: int | None = Field(None, ge=1, description="only the first N problems of each task")
    samples: int = Field(1, ge=1, le=1024, description="responses to each problem, whose answers vote; 1 is no vote")
    temperature: float = Field(0, ge=0, description="sampling temperature, in the papers 0.3; greedy without it")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of sampled responses")
    max_new_tokens: int | None = Field(
        None, ge=1, description="most tokens of a response; the task's own without it, 10240 for the papers' six"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    def check(self) -> None:
        """Refuse tasks that there are not, votes that would all be the same, and a seed of nothing.

        Raises:
            RecipeError: what is wrong, in one line.
        """
        for number, name in enumerate(self.tasks):
            if name not in TASKS:
                raise RecipeError(f"--tasks: there is no {name!r}: {suggest(name, TASKS)}")
            if name in self.tasks[:number]:
                raise RecipeError(f"--tasks: {name} is given twice")
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(
                f"--samples {self.samples}: greedy responses are all the same: give a --temperature, in the papers 0.3"
            )
        if "seed" in self.model_fields_set and self.temperature == 0:
            raise RecipeError(f"--seed {self.seed}: nothing is drawn in greedy responses: give a --temperature too")
        if self.data is not None and not self.data.is_dir():
            raise RecipeError(f"--data {self.data}: there is no such folder")
