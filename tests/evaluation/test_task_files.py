"""The task files: the papers' settings, and that lm-evaluation-harness runs them without us."""

from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from streammerge.evaluation.grading import process_results
from streammerge.evaluation.settings import PAPER_TASKS, TASKS
from streammerge.evaluation.task_files import FOLDER, read_task

PROMPT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\nWhat is {{1}} + {1}?<|im_end|>\n<|im_start|>assistant\n"
)
"""`qwen25-math-cot` of the Qwen2.5-Math toolkit. Braces in a problem stay what they are."""

KNOWN = {
    "gsm8k": (761421, 1319, "9f098df7ff452207"),
    "math500": (446564, 500, None),
    "minerva_math": (247267, 272, "0e656b430d3a0a1d"),
    "olympiadbench": (1493870, 675, "bb8c1e38a16ea9ea"),
    "college_math": (1188309, 2818, "91131bc4a355b884"),
    "aime24": (156944, 30, "af2b8bd2aa911b63"),
}
"""Bytes, rows and SHA-256 of the files of the toolkit."""


def test_every_task_has_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.yaml")} == {*TASKS}
    assert {*KNOWN} == {*PAPER_TASKS}


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_settings_of_the_papers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the harness itself reads the file, its data set being one row of ours."""
    asked: list[Any] = []

    def load_dataset(**options: Any) -> Any:
        asked.append(options)
        return {"test": datasets.Dataset.from_list([{"problem": "What is {{1}} + {1}?", "solution": r"\boxed{2}"}])}

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", load_dataset)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    (task,) = manager.load([f"streammerge_{name}"])["tasks"].values()
    (doc,) = task.test_docs()
    assert task.doc_to_text(doc) == task.fewshot_context(doc, num_fewshot=0) == PROMPT
    assert (task.doc_to_target(doc), task.config.repeats, task.config.num_fewshot) == ("2", 1, 0)
    stops = ["</s>", "<|im_end|>", "<|endoftext|>"]
    assert task.config.generation_kwargs == {"until": stops, "do_sample": False, "max_gen_toks": 10240}
    assert task.process_results(doc, [r"\boxed{2}"]) == {"accuracy": 1.0, "sample_accuracy": 1.0}
    assert task.config.process_results is process_results
    ours = read_task(name)
    assert ours.hub is not None
    assert (ours.until, ours.max_new_tokens, ours.registered) == ((*stops,), 10240, f"streammerge_{name}")
    files = {"test": ours.hub.name}
    expected = {"path": ours.hub.repository, "name": None, "revision": ours.hub.revision, "data_files": files}
    assert asked == [expected]
    assert len(ours.hub.revision) == 40
    size, rows, sha256 = KNOWN[name]
    assert (ours.hub.size, ours.hub.sha256, task.config.metadata["rows"]) == (size, sha256, rows)


def test_the_harness_runs_a_task_without_us(sevens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "3 and 4?", "answer": "#### 7"}, {"question": "2 and 2?", "answer": "#### 4"}]
    found = {"test": datasets.Dataset.from_list(rows)}
    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", lambda **_: found)
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False).load(["streammerge_gsm8k"])
    result = lm_eval.evaluate(HFLM(str(sevens), device="cpu", batch_size=2), tasks, bootstrap_iters=0)
    assert result["results"]["streammerge_gsm8k"]["accuracy,none"] == 0.5


def test_the_small_problems_are_asked_plainly() -> None:
    task = read_task("mini_l2s")
    assert (task.prompt, task.until, task.max_new_tokens, task.hub) == ("{{question}}", (), 256, None)
