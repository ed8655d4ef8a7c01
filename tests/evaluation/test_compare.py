"""`streammerge eval --compare`: from results, by evaluating, and what is not comparable."""

import hashlib
import json
import math
import statistics
from importlib import import_module
from pathlib import Path
from shutil import copytree

import pytest
from evaluation.chain_model import BOXED_7, make_chain_model
from tiny_models import Run, content

from streammerge.evaluation.compare import _names
from streammerge.evaluation.scores import averages
from streammerge.evaluation.task_files import HubFile

TASKS = ("--tasks", "gsm8k,math500")


@pytest.fixture(scope="module")
def fours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Answers \boxed{4} and a dot after it, ten tokens."""
    chain = {**BOXED_7, "{": "4", "4": "}", "}": ".", ".": "<|im_end|>"}
    return make_chain_model(tmp_path_factory.mktemp("models") / "fours", chain)


TABLE = """\
model          gsm8k  math500  average  length  truncated
------  ------------  -------  -------  ------  ---------
sevens  50.0 +- 28.9    100.0     75.0     9.0        0.0
fours   25.0 +- 25.0      0.0     12.5    10.0        0.0

problems: all 4 of gsm8k, all 1 of math500; not the papers' files
accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error
"""
MARKDOWN = """\
| model | gsm8k | math500 | average | length | truncated |
| --- | ---: | ---: | ---: | ---: | ---: |
| sevens | 50.0 +- 28.9 | 100.0 | 75.0 | 9.0 | 0.0 |
| fours | 25.0 +- 25.0 | 0.0 | 12.5 | 10.0 | 0.0 |

- Problems: all 4 of gsm8k, all 1 of math500; not the papers' files.
- Accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error.
"""


def test_from_results_and_by_evaluating(sevens: Path, fours: Path, data: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "results"
    assert run("eval", sevens, *TASKS, "--data", data, "--out", out / "sevens").code == 0
    result = run("eval", "--compare", out / "sevens", fours, *TASKS, "--data", data, "--out", out)
    assert (result.code, result.out, result.err) == (0, TABLE, "")
    assert (out / "compare.md").read_text() == MARKDOWN
    found = json.loads((out / "compare.json").read_text())
    assert found["tasks"] == ["gsm8k", "math500"]
    assert [row["name"] for row in found["models"]] == ["sevens", "fours"]
    assert [row["average"]["accuracy"] for row in found["models"]] == [0.75, 0.125]
    assert found["models"][1]["model"] == {"id": str(fours), "revision": None}
    before = content(out)
    again = run("eval", "--compare", out / "sevens", out / "fours", "--out", out)  # no model is looked at any more
    assert (again.out, content(out)) == (TABLE, before)
    as_json = run("eval", "--compare", out / "sevens", out / "fours", "--json")
    assert json.loads(as_json.out) == found


def test_averages_need_all_tasks(sevens: Path, fours: Path, data: Path, tmp_path: Path, run: Run) -> None:
    for model, tasks in ((sevens, "math500,gsm8k"), (fours, "gsm8k")):
        options = ("--tasks", tasks, "--data", data, "--out", tmp_path / model.name)
        assert run("eval", model, *options).code == 0
    result = run("eval", "--compare", tmp_path / "fours", tmp_path / "sevens")
    assert result.out.splitlines() == [
        "model          gsm8k  math500  average  length  truncated",
        "------  ------------  -------  -------  ------  ---------",
        "fours   25.0 +- 25.0        -        -       -          -",
        "sevens  50.0 +- 28.9    100.0     75.0     9.0        0.0",
        "",
        "problems: all 4 of gsm8k, all 1 of math500; not the papers' files",
        "accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error",
        "note: no averages of fours: not all tasks are there",
    ]
    common = run("eval", "--compare", tmp_path / "fours", tmp_path / "sevens", "--tasks", "gsm8k")
    assert common.out.splitlines()[2:4] == [
        "fours   25.0 +- 25.0  25.0 +- 25.0    10.0        0.0",
        "sevens  50.0 +- 28.9  50.0 +- 28.9     9.0        0.0",
    ]
    none = run("eval", "--compare", tmp_path / "fours", tmp_path / "sevens", "--tasks", "aime24")
    assert none.err == "streammerge: error: --compare: no folder holds a result of aime24\n"


def test_a_comparison_says_of_what(
    sevens: Path, fours: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many problems of how many, the errors, how responses were drawn, and whose problems they were."""
    digest = hashlib.sha256((data / "gsm8k.jsonl").read_bytes()).hexdigest()
    monkeypatch.setattr(HubFile, "is_it", lambda self, size, sha256: sha256 == digest)
    options = (*TASKS, "--data", data, "--limit", "3", "--temperature", "0.3", "--samples", "2", "--seed", "5")
    for model in (sevens, fours):
        assert run("eval", model, *options, "--out", tmp_path / model.name).code == 0
    result = run("eval", "--compare", tmp_path / "sevens", tmp_path / "fours")
    assert result.out.splitlines()[2:] == [
        "sevens  66.7 +- 33.3    100.0     83.3     9.0        0.0",
        "fours   33.3 +- 33.3      0.0     16.7    10.0        0.0",
        "",
        "problems: 3 of the 4 of gsm8k, all 1 of math500; the papers' files but for math500",
        "responses: 2 to each problem, accuracy of their vote, at temperature 0.3, seed 5 (gsm8k, math500)",
        "accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error",
    ]
    found = json.loads(run("eval", "--compare", tmp_path / "sevens", tmp_path / "fours", "--json").out)
    row = found["models"][0]
    assert row["tasks"]["gsm8k"]["stderr"] == pytest.approx(statistics.stdev([1, 0, 1]) / math.sqrt(3))
    assert row["average"]["stderr"] is None  # math500 has but one problem
    assert {task: source["rows"] for task, source in found["problems"].items()} == {"gsm8k": 4, "math500": 1}
    assert found["settings"]["gsm8k"]["temperature"] == 0.3


def test_the_error_of_an_average() -> None:
    """That of the mean of independent means: by the variances, which add."""
    tasks = [{"accuracy": 0.5, "mean_length": 1, "truncated": 0, "stderr": error} for error in (0.3, 0.4)]
    assert averages(tasks)["stderr"] == pytest.approx(math.sqrt(0.3**2 + 0.4**2) / 2)


def test_tasks_are_those_of_the_results(
    sevens: Path, fours: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none are named; the papers' other four are not even there."""
    for name, tasks in (("both", "math500,gsm8k"), ("one", "gsm8k")):
        assert run("eval", sevens, "--tasks", tasks, "--data", data, "--out", tmp_path / name).code == 0
    result = run("eval", "--compare", tmp_path / "both", fours, "--data", data, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["tasks"] == ["gsm8k", "math500"]
    module = import_module("streammerge.evaluation.compare")
    monkeypatch.setattr(module, "load_all", lambda settings: pytest.fail("problems are looked for"))
    result = run("eval", "--compare", tmp_path / "both", fours, tmp_path / "one", "--data", data)
    expected = (
        f"--compare: {tmp_path}/both holds gsm8k, math500, {tmp_path}/one gsm8k: "
        "give --tasks to say on which the other models are evaluated"
    )
    assert (result.code, result.out, result.err) == (1, "", f"streammerge: error: {expected}\n")


def test_what_was_not_measured_alike(sevens: Path, data: Path, tmp_path: Path, run: Run) -> None:
    for name, limit in (("two", "2"), ("three", "3")):
        options = ("--tasks", "gsm8k", "--data", data, "--limit", limit, "--out", tmp_path / name)
        assert run("eval", sevens, *options).code == 0
    result = run("eval", "--compare", tmp_path / "two", tmp_path / "three")
    expected = "--compare: not measured alike: gsm8k of two and three: problems.limit (2 -> 3)"
    assert (result.code, result.out, result.err) == (1, "", f"streammerge: error: {expected}\n")
    model = copytree(sevens, tmp_path / "model")
    fresh = run("eval", "--compare", tmp_path / "two", model, "--tasks", "gsm8k", "--data", data)
    assert "gsm8k of two and model: problems.limit (2 -> none)" in fresh.err


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("a",), "give at least two models"),
        (("a", "b", "a"), "a is given twice"),
        (("nowhere", "neither"), "model nowhere: there is no such folder"),
        (("n" * 300, "neither"), f"model {'n' * 300}: there is no such folder"),
    ],
)
def test_refused(
    models: tuple[str, ...], message: str, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("eval", "--compare", *models, *TASKS, "--data", data)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert message in result.err


def test_control_characters_in_a_name(sevens: Path, data: Path, tmp_path: Path, run: Run) -> None:
    raw = tmp_path / "we\x1b[31m|ird\n"
    copytree(sevens, raw)
    result = run("eval", "--compare", raw, sevens, "--tasks", "math500", "--data", data, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.out.splitlines()[2].startswith("we\\x1b[31m|ird\\n  ")
    assert (tmp_path / "out" / "compare.md").read_text().splitlines()[2].startswith("| we\\x1b[31m\\|ird\\n | ")


def test_names() -> None:
    assert _names(["r/base", "org/merged@main"]) == {"r/base": "base", "org/merged@main": "merged@main"}
    assert _names(["a/x", "b/x/"]) == {"a/x": "a-x", "b/x/": "b-x"}
    assert _names([".", ".."]) == {".": "model-1", "..": "model-2"}
