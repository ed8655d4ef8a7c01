"""`streammerge eval` as a whole: numbers computed by hand, results in a folder, what is refused and when."""

import json
import math
import re
import threading
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from evaluation.chain_model import BOXED_7, make_chain_model
from evaluation.conftest import WriteRows
from huggingface_hub import close_session, constants
from tiny_models import Run, content, edit, edit_config

import streammerge
from streammerge import mini_l2s
from streammerge.errors import RecipeError
from streammerge.evaluation import run as run_module
from streammerge.evaluation.harness import Harness
from streammerge.testing import Hub

TASKS = ("--tasks", "gsm8k,math500")


def test_numbers_by_hand(sevens: Path, data: Path, run: Run) -> None:
    r"""Of gsm8k's four problems two are answered by 7; \boxed{7} has nine tokens."""
    result = run("eval", sevens, *TASKS, "--data", data, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    common = {"mean_length": 9.0, "truncated": 0.0, "no_answer": 0.0, "samples": 1}
    half = {"accuracy": 0.5, "stderr": math.sqrt(0.25 / 3), "sample_accuracy": 0.5, "problems": 4, **common}
    whole = {"accuracy": 1.0, "stderr": None, "sample_accuracy": 1.0, "problems": 1, **common}
    assert found["tasks"] == {"gsm8k": half, "math500": whole}
    assert found["average"] == {"accuracy": 0.75, "mean_length": 9.0, "truncated": 0.0, "stderr": None}
    assert found["model"] == {"id": str(sevens), "revision": None}


def test_the_table(sevens: Path, data: Path, run: Run) -> None:
    result = run("eval", sevens, *TASKS, "--data", data, "--max-new-tokens", "8", "--limit", "3")
    assert result.out.splitlines() == [
        "task     accuracy    +-  length  truncated  no answer",
        "-------  --------  ----  ------  ---------  ---------",
        "gsm8k        66.7  33.3     8.0      100.0        0.0",
        "math500     100.0     -     8.0      100.0        0.0",
        "average      83.3     -     8.0      100.0",
        "",
        "problems: 3 of the 4 of gsm8k, all 1 of math500; not the papers' files",
        "accuracy and truncated in %, length in tokens of the model's own tokenizer; +- is the standard error",
    ]


def test_votes_of_sampled_responses(tmp_path: Path, data: Path, run: Run) -> None:
    """Lengths differ from response to response: the mean is over all of them."""
    model = make_chain_model(tmp_path / "model", {**BOXED_7, "{": ["7", "1"], "1": ["1", "}"]})
    options = ("--data", data, "--samples", "4", "--temperature", "0.3", "--out", tmp_path / "out")
    result = run("eval", model, *TASKS, *options, "--json")
    assert (result.code, result.err) == (0, "")
    for task, scores in json.loads(result.out)["tasks"].items():
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{task}.responses.jsonl").read_text().splitlines()]
        responses = [response for row in rows for response in row["responses"]]
        assert (scores["samples"], scores["problems"]) == (4, len(rows))
        assert scores["mean_length"] == sum(len(response["text"]) for response in responses) / len(responses)
        assert scores["sample_accuracy"] == sum(r["text"] == r"\boxed{7}" for r in responses if r["right"]) / len(
            responses
        )
        elected = []
        for row in rows:
            answers = [response["answer"] for response in row["responses"]]
            elected.append(max(answers, key=answers.count) == row["gold"])  # max keeps the first of equals
        assert scores["accuracy"] == sum(elected) / len(rows)


def test_small_problems_are_asked_and_answered_plainly(tmp_path: Path, write_rows: WriteRows, run: Run) -> None:
    """The last of a question leads to an answer after the word, to another, or to a chain without the word."""
    chain = {"?": "x", "x": " ", " ": "7", "!": "a", "a": "n", "n": "s", "s": "w", "w": "e", "e": "r", "r": " "}
    model = make_chain_model(tmp_path / "model", chain)
    rows = [{"question": "1 ?", "answer": 7}, {"question": "2 !", "answer": 7}, {"question": "3 !", "answer": "8"}]
    data = write_rows("mini_l2s.jsonl", rows).parent
    result = run("eval", model, "--tasks", "mini_l2s", "--data", data, "--json")
    assert (result.code, result.err) == (0, "")
    scores = json.loads(result.out)["tasks"]["mini_l2s"]
    assert (scores["accuracy"], scores["no_answer"]) == (1 / 3, 1 / 3)
    assert scores["mean_length"] == (len("x 7") + 2 * len("answer 7")) / 3


@pytest.mark.parametrize("name", ["base", "long"])
def test_the_pair_has_the_scores_that_its_own_scoring_gives(name: str, run: Run) -> None:
    """Two ways of asking, generating, grading and counting: the harness with math-verify, and mini_l2s.score."""
    model = dict(zip(("base", "long"), mini_l2s.pair(), strict=True))[name]
    result = run("eval", model, "--tasks", "mini_l2s", "--limit", "20", "--json")
    assert (result.code, result.err) == (0, "")
    found, own = json.loads(result.out)["tasks"]["mini_l2s"], mini_l2s.score(model, limit=20, progress=False)
    keys = ("accuracy", "mean_length", "truncated", "problems")
    assert {key: found[key] for key in keys} == pytest.approx({key: own[key] for key in keys})
    assert 0 < found["accuracy"] <= 1


def test_what_is_written(sevens: Path, data: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "results" / "sevens"
    assert run("eval", sevens, *TASKS, "--data", data, "--out", out).code == 0
    ends = (".json", ".responses.jsonl")
    assert {*content(out)} == {f"{task}{end}" for task in ("gsm8k", "math500") for end in ends}
    record = json.loads((out / "gsm8k.json").read_text())
    assert record["problems"] == {
        "file": str(data / "gsm8k.jsonl"),
        "sha256": record["identity"]["problems"]["sha256"],
        "rows": 4,
        "papers_file": False,
    }
    assert record["identity"]["grader"] == "math-verify 0.9.0"
    assert record["ran"]["libraries"]["lm_eval"] == "0.4.13"
    assert (record["ran"]["device"], record["ran"]["dtype"]) == ("cpu", "float32")
    rows = [json.loads(line) for line in (out / "gsm8k.responses.jsonl").read_text().splitlines()]
    assert [(row["question"], row["gold"], row["right"]) for row in rows][:2] == [
        ("3 and 4?", "7", True),
        ("2 and 2?", "4", False),
    ]
    assert rows[1]["responses"] == [{"text": r"\boxed{7}", "tokens": 9, "ended": True, "answer": "7", "right": False}]


def test_an_interrupted_run_goes_on(
    sevens: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second task, the first is not run again; the result is that of one go."""
    options = ("eval", sevens, *TASKS, "--data", data)
    whole = run(*options, "--json").out
    ran: list[str] = []
    plain = Harness.run

    def counted(self: Harness, name: str) -> Any:
        ran.append(name)
        if ran == ["gsm8k", "math500"]:
            raise KeyboardInterrupt
        return plain(self, name)

    monkeypatch.setattr(Harness, "run", counted)
    stopped = run(*options, "--out", tmp_path / "out")
    again = "goes on with the tasks that are not in --out; the one it was at starts over"
    assert (stopped.code, stopped.err) == (130, f"streammerge: stopped; the same command {again}\n")
    assert {*content(tmp_path / "out")} == {"gsm8k.json", "gsm8k.responses.jsonl"}
    assert run(*options, "--out", tmp_path / "out", "--json").out == whole
    assert ran == ["gsm8k", "math500", "math500"]
    monkeypatch.setattr(run_module, "default_device", lambda: pytest.fail("nothing is left to be run"))
    assert run(*options, "--out", tmp_path / "out", "--json").out == whole


def test_results_of_something_else_are_not_taken_for_these(
    sevens: Path, data: Path, tmp_path: Path, run: Run, write_rows: WriteRows
) -> None:
    model, out = Path(copytree(sevens, tmp_path / "model")), tmp_path / "out"
    options = ("--tasks", "math500", "--data", data, "--out", out)
    assert run("eval", model, *options).code == 0
    before = content(out)
    for changed, message in [
        (("--max-new-tokens", "9"), "settings.max_new_tokens (10240 -> 9)"),
        (("--samples", "2", "--temperature", "0.3"), "settings.samples (1 -> 2); settings.temperature (0"),
        (("--limit", "1"), "problems.limit (none -> 1)"),
    ]:
        result = run("eval", model, *options, *changed)
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert f"{out}/math500.json: made with something else: {message}" in result.err
    write_rows("math500/test.jsonl", [{"problem": "?", "answer": 8}])
    assert "problems.sha256" in run("eval", model, *options).err
    write_rows(
        "math500/test.jsonl",
        [{"problem": "$\\sqrt{49}$?", "solution": "It is $\\boxed{7}$.", "answer": "7", "level": 1}],
    )
    assert run("eval", model, *options).code == 0
    edit_config(model, rope_theta=5.0)
    assert "config.json was written to since" in run("eval", model, *options).err
    copytree(sevens, model, dirs_exist_ok=True)
    edit(model, lambda state: state["lm_head.weight"].mul_(2))  # most of it is zero, the samples of a fingerprint too
    assert "model.safetensors was written to since" in run("eval", model, *options).err
    edit(model, lambda state: state["model.norm.weight"].mul_(2))
    assert "its tensors have changed" in run("eval", model, *options).err
    assert content(out) == before
    assert run("eval", model, *options, "--overwrite", "--limit", "1").code == 0
    assert json.loads((out / "math500.json").read_text())["identity"]["problems"]["limit"] == 1


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown task": (("--tasks", "gsm8k,math5000"), "--tasks: there is no 'math5000': did you mean 'math500'?"),
    "task twice": (("--tasks", "gsm8k,gsm8k"), "--tasks: gsm8k is given twice"),
    "no folder": (("--data", "{tmp}/nowhere"), "--data {tmp}/nowhere: there is no such folder"),
    "no file": (("--tasks", "aime24"), "--data {data}: task aime24: there is no aime24.jsonl and no aime24/test.jsonl"),
    "greedy votes": (("--samples", "16"), "--samples 16: greedy responses are all the same: give a --temperature"),
    "greedy seed": (("--seed", "3"), "--seed 3: nothing is drawn in greedy responses: give a --temperature too\n"),
    "no number": (("--limit", "many"), "error: --limit many: must be a whole number\n"),
    "no temperature": (("--temperature", "warm"), "error: --temperature warm: must be a number\n"),
    "no limit": (("--limit", "0"), "error: --limit 0: must be at least 1\n"),
    "too many": (
        ("--samples", "1025", "--max-new-tokens", "0"),
        "--samples 1025: must be at most 1024; --max-new-tokens 0: must be at",
    ),
    "foreign folder": (("--out", "{tmp}/foreign"), "output folder {tmp}/foreign holds 'notes.txt', which is no result"),
    "file": (("--out", "{tmp}/foreign/notes.txt"), "output {tmp}/foreign/notes.txt is a file"),
    "in the model": (("--out", "{model}/results"), "output folder {model}/results lies in the model"),
    "no result": (("--out", "{tmp}/other"), "{tmp}/other/gsm8k.json: no result of `streammerge eval`"),
    "no device": (("--device", "abacus"), "--device abacus: there is no such device here"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_is_loaded(
    sevens: Path,
    data: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(
        "streammerge.evaluation.harness._Model.__init__", lambda *_, **__: pytest.fail("the model is loaded")
    )
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "gsm8k.json").write_text('{"task": "gsm8k"}\n')
    before = content(tmp_path), content(sevens)
    names = {"tmp": tmp_path, "data": data, "model": sevens}
    result = run("eval", sevens, *TASKS, "--data", data, *(option.format(**names) for option in options))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert message.format(**names) in result.err
    assert (content(tmp_path), content(sevens)) == before


def test_models_that_are_none(sevens: Path, data: Path, tmp_path: Path, run: Run) -> None:
    options = (*TASKS, "--data", data)
    result = run("eval", tmp_path / "nowhere", *options)
    assert (result.code, result.err.count("\n")) == (1, 1) and "there is no such folder" in result.err
    bare = Path(copytree(sevens, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    result = run("eval", bare, *options)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"model {bare}: brings no tokenizer" in result.err
    assert run("eval", sevens, sevens, *options).code == 2
    strange = Path(copytree(sevens, tmp_path / "strange"))
    edit_config(strange, model_type="abacus", architectures=["Abacus"])
    result = run("eval", strange, *options)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"model {strange}: transformers 5" in result.err and "cannot load it as a causal language" in result.err
    edit_config(strange, auto_map={"AutoConfig": "org/other--code.Config"})
    result = run("eval", strange, *options, "--trust-remote-code")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "its config takes code from another repository, not pinned" in result.err
    result = run("eval", "org/model", *options, "--trust-remote-code")
    assert (result.code, result.err.count("\n")) == (1, 1) and "pin org/model to the commit" in result.err
    holed = Path(copytree(sevens, tmp_path / "holed"))
    edit(holed, lambda state: state.pop("model.norm.weight"))
    result = run("eval", holed, *options)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"model {holed}: tensor 'model.norm.weight' is missing" in result.err
    edit(holed, lambda state: state.update({"model.norm.weight": torch.ones(3)}))
    result = run("eval", holed, *options)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"model {holed}: transformers 5" in result.err


def test_too_little_memory(sevens: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("streammerge.evaluation.harness.HFLM._model_generate", full)
    result = run("eval", sevens, *TASKS, "--data", data)
    expected = f"evaluating {sevens} ran out of memory: take a smaller --batch-size or --max-new-tokens"
    assert (result.code, result.err) == (1, f"streammerge: error: {expected}\n")


def test_a_model_on_the_hub(
    sevens: Path, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the commit that its branch was at."""
    close_session()
    with Hub() as hub:
        commit = hub.add("org/sevens", sevens)
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(constants, name, value)
        options = ("--tasks", "math500", "--data", data, "--json")
        result = run("eval", "org/sevens", *options)
        assert (result.code, result.err) == (0, "")
        found = json.loads(result.out)
        assert found["tasks"]["math500"]["accuracy"] == 1
        assert found["model"] == {"id": "org/sevens", "revision": commit}
    close_session()


@pytest.mark.parametrize("missing", ["lm_eval", "math_verify"])
def test_without_the_extra(sevens: Path, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(run_module, "find_spec", lambda name: None if name == missing else name)
    result = run("eval", sevens, *TASKS, "--data", data)
    get_it = "pip install -c constraints.txt '.[eval]' in the checkout"
    expected = f"streammerge: error: eval needs {missing}, not installed here: {get_it}\n"
    assert (result.code, result.err) == (1, expected)


def test_only_in_the_main_thread(sevens: Path, data: Path) -> None:
    found: list[BaseException] = []

    def call() -> None:
        try:
            streammerge.evaluate(str(sevens), {"tasks": ["gsm8k"], "data": data})
        except RecipeError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert re.match("eval: call it from the main thread", str(found[0]))
