"""A model on the tasks: checked, run, graded, written."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from streammerge._version import __version__
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.locate import open_model, require_pinned
from streammerge.errors import CheckpointError, RecipeError
from streammerge.evaluation.problems import Problems, load_problems
from streammerge.evaluation.scores import averages, task_scores
from streammerge.evaluation.settings import EvaluationSettings
from streammerge.evaluation.store import check_folder, model_identity, read_results, require_same, write_result
from streammerge.evaluation.task_files import TaskFile, read_task
from streammerge.extras import get_it
from streammerge.fisher.placement import default_device
from streammerge.heap import large_imports
from streammerge.host import memory_errors
from streammerge.names import Named
from streammerge.schema import build

BATCH_SIZE = 8
_NEEDED = ("lm_eval", "math_verify", "datasets")

Record = Mapping[str, Any]  # what TASK.json holds


@dataclass(frozen=True)
class How:
    """How models are run; nothing here changes what is measured but by rounding.

    Attributes:
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        batch_size: responses that are generated at a time.
        trust_remote_code: run Python code that the model brings.
        overwrite: replace results that were made of something else.
        progress: show progress bars on standard error.
    """

    device: str | None = None
    batch_size: int = BATCH_SIZE
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = False

    def check(self) -> None:
        """Refuse what cannot be run here.

        Raises:
            RecipeError: what is missing or wrong, in one line.
        """
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise RecipeError(f"eval needs {' and '.join(missing)}, not installed here: {get_it('eval')}")
        if threading.current_thread() is not threading.main_thread():
            raise RecipeError("eval: call it from the main thread: the time of grading is bounded by a signal")
        if self.batch_size < 1:
            raise RecipeError(f"--batch-size {self.batch_size}: at least 1")


def evaluate(
    model: Named,
    settings: EvaluationSettings | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    batch_size: int = BATCH_SIZE,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Let a model solve the problems of tasks, and grade its answers.

    Everything that can be refused is refused before the model is loaded. With `out`, each task's result is written
    when it is done; called again, only the tasks that are not there are run.

    Args:
        model: folder, org/name[@revision] or hf://org/name[@revision].
        settings: tasks, problems, how responses are drawn; a mapping is read as `EvaluationSettings`.
        out: folder for the results and all responses.
        device: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        batch_size: responses that are generated at a time. Rounding may depend on it.
        trust_remote_code: run Python code that the model brings; a Hub model must then be pinned to a commit.
        overwrite: replace results in `out` that were made of something else.
        progress: show progress bars on standard error.

    Returns:
        Plain values: version, model (id and revision), settings, `problems` (name -> where they are from, how many
        `rows` there are), `tasks` (name -> see `task_scores`), `average` of accuracy (with its stderr), mean_length and
        truncated: unweighted over the tasks. Shares from 0 to 1, lengths in tokens.

    Raises:
        RecipeError: no such task, file or device; a row that is no problem; settings that make no sense; the packages
            of the extra `eval` are not installed; called from another thread than the main one.
        CheckpointError: not a model that can be read, without tokenizer, or with too few positions.
        OutputExistsError: `out` holds something else.
        MemoryBudgetError: it ran out of memory.
        TransferError: the Hub or the disk refuses.
    """
    if not isinstance(settings, EvaluationSettings):
        settings = build(EvaluationSettings, settings or {}, "evaluation")
    how = How(device, batch_size, trust_remote_code, overwrite, progress)
    how.check()
    settings.check()
    problems = load_all(settings)
    with Evaluation(model, settings, problems, how, None if out is None else Path(out)) as evaluation:
        records = evaluation.run()
        identity = evaluation.model
    return {
        "version": __version__,
        "model": {"id": identity["id"], "revision": identity["revision"]},
        "settings": settings.model_dump(mode="json"),
        "problems": {name: record["problems"] for name, record in records.items()},
        "tasks": {name: record["scores"] for name, record in records.items()},
        "average": averages(record["scores"] for record in records.values()),
    }


def load_all(settings: EvaluationSettings) -> dict[TaskFile, Problems]:
    """The problems of every task asked for."""
    tasks = [read_task(name) for name in settings.tasks]
    return {task: load_problems(task, settings.data, settings.limit) for task in tasks}


class Evaluation:
    """One model and what is to be done on it: all that can be checked is checked when this is made.

    Attributes:
        model: its identity.
        identities: by task, what its result depends on.
    """

    def __init__(
        self,
        model: Named,
        settings: EvaluationSettings,
        problems: Mapping[TaskFile, Problems],
        how: How,
        folder: Path | None,
    ) -> None:
        if how.trust_remote_code:
            require_pinned(model)
        self._settings, self._problems, self._how, self._folder = settings, problems, how, folder
        self._checkpoint: Checkpoint = open_model(model, progress=how.progress)
        try:
            if how.trust_remote_code and "--" in str(self._checkpoint.config.get("auto_map")):
                raise CheckpointError(f"model {model}: its config takes code from another repository, not pinned")
            self.model = model_identity(self._checkpoint)
            self.identities = {task.name: self._identity(task) for task in problems}
            self._done = self._read_done()
        except BaseException:
            self._checkpoint.close()
            raise

    def run(self) -> dict[str, Record]:
        """Run the tasks that are not done, and write them one by one; the results of all."""
        left = [task for task in self._problems if task.name not in self._done]
        if left:
            with memory_errors(f"evaluating {self._checkpoint.id}", "take a smaller --batch-size or --max-new-tokens"):
                self._done |= self._run(left)
        return {task.name: self._done[task.name] for task in self._problems}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._checkpoint.close()

    def _run(self, tasks: list[TaskFile]) -> dict[str, Record]:
        with large_imports():
            from streammerge.evaluation.harness import Draw, Harness, libraries  # imports torch and transformers

        harness = Harness(
            str(self._checkpoint.folder or self._checkpoint.id),
            self._checkpoint.revision,
            device=self._how.device or default_device(),
            batch_size=self._how.batch_size,
            trust_remote_code=self._how.trust_remote_code,
            progress=self._how.progress,
            questions={task: (self._problems[task].rows, Draw(**self._drawn(task))) for task in tasks},
        )
        done: dict[str, Record] = {}
        for task in tasks:
            started = time.perf_counter()
            solved = harness.run(task.name)
            ran = {"device": harness.device, "dtype": harness.dtype, "batch_size": self._how.batch_size}
            done[task.name] = {
                "version": __version__,
                "task": task.name,
                "scores": task_scores(solved),
                "identity": self.identities[task.name],
                "problems": self._problems[task].source,
                "ran": {**ran, "seconds": round(time.perf_counter() - started, 1), "libraries": libraries()},
            }
            if self._folder is not None:
                write_result(self._folder, task.name, done[task.name], solved)
        return done

    def _read_done(self) -> dict[str, Record]:
        if self._folder is None:
            return {}
        check_folder(self._folder, self._checkpoint.folder)
        if self._how.overwrite:
            return {}
        found = {name: record for name, record in read_results(self._folder).items() if name in self.identities}
        for name, record in found.items():
            require_same(self._folder / f"{name}.json", record, self.identities[name])
        return dict(found)

    def _identity(self, task: TaskFile) -> dict[str, Any]:
        from streammerge.evaluation.grading import grader

        return {
            "model": self.model,
            "settings": {**self._drawn(task), "prompt": task.prompt, "until": list(task.until)},
            "problems": {"sha256": self._problems[task].source["sha256"], "limit": self._settings.limit},
            "grader": grader(),
        }

    def _drawn(self, task: TaskFile) -> dict[str, Any]:
        """How the responses are drawn: the fields of a `Draw`."""
        return {
            "samples": self._settings.samples,
            "temperature": self._settings.temperature,
            "seed": self._settings.seed if self._settings.temperature else None,
            "max_new_tokens": self._settings.max_new_tokens or task.max_new_tokens,
        }
