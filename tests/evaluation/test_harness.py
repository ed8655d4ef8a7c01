"""The real lm-evaluation-harness on models whose responses are known beforehand."""

import inspect
import logging
import os
import re
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import lm_eval.api.task
import pytest
import torch
import transformers
from evaluation.chain_model import BOXED_7, END, STOP, make_chain_model, make_tokenizer
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from streammerge.errors import CheckpointError, RecipeError
from streammerge.evaluation.harness import TESTED, Draw, Harness, Response
from streammerge.evaluation.task_files import TaskFile, read_task

GREEDY = Draw(samples=1, temperature=0, seed=None, max_new_tokens=12)


def harness(model: Path, task: TaskFile, questions: list[str], draw: Draw = GREEDY, batch_size: int = 8) -> Harness:
    rows = [{"question": question, "answer": "7"} for question in questions]
    options = {"device": "cpu", "trust_remote_code": False, "progress": True}
    return Harness(str(model), None, batch_size=batch_size, questions={task: (rows, draw)}, **options)


def run(
    model: Path, task: TaskFile, questions: list[str], draw: Draw = GREEDY, batch_size: int = 8
) -> list[list[Response]]:
    solved = harness(model, task, questions, draw, batch_size).run(task.name)
    assert [problem.question for problem in solved] == questions
    return [problem.responses for problem in solved]


def plain(*until: str) -> TaskFile:
    """The question is the prompt."""
    return TaskFile("gsm8k", "streammerge_gsm8k", "{{question}}", until, 256, None)


def test_the_version_whose_insides_are_used() -> None:
    """With another one look at `harness.py` again: everything below, and where it overrides methods."""
    assert version("lm_eval") == TESTED
    assert [*inspect.signature(HFLM._model_generate).parameters][1:4] == ["context", "max_length", "stop"]
    assert [*inspect.signature(HFLM.generate_until).parameters] == ["self", "requests", "disable_tqdm"]
    assert [*inspect.signature(CacheHook.add_partial).parameters] == ["self", "attr", "req", "res"]
    assert hasattr(lm_eval.api.task, "tqdm")


def test_a_boxed_answer(sevens: Path) -> None:
    assert run(sevens, read_task("gsm8k"), ["3 and 4?"]) == [[Response(r"\boxed{7}", 9, True, "7", True)]]


@pytest.mark.parametrize(
    ("most", "response"),
    [
        (10, Response(r"\boxed{7}", 9, True, "7", True)),  # nine characters and the stop token: it just fits
        (9, Response(r"\boxed{7}", 9, False, "7", True)),
        (8, Response(r"\boxed{7", 8, False, "7", True)),  # the open box counts up to the end
        (5, Response(r"\boxe", 5, False, None, False)),
    ],
)
def test_cut_responses(sevens: Path, most: int, response: Response) -> None:
    draw = Draw(samples=1, temperature=0, seed=None, max_new_tokens=most)
    assert run(sevens, read_task("gsm8k"), ["3 and 4?"], draw) == [[response]]


def test_lengths_count_what_the_tokenizer_adds(tmp_path: Path) -> None:
    r"""By the model's own tokenizer, of the text without blanks around it and without what stopped it."""
    chain = {**BOXED_7, "\n": " ", " ": "\\", "7": "}", "}": "\t"}
    model = make_chain_model(tmp_path, chain | {"}": "~", "~": END}, bos=True)
    ((response,),) = run(model, read_task("gsm8k"), ["?"])
    assert (response.text, response.tokens) == (r"\boxed{7}~", 11)
    assert response.tokens == len(make_tokenizer(bos=True)(response.text)["input_ids"])


def test_a_stop_token_ends_its_row_of_a_batch(tmp_path: Path) -> None:
    """The one row is stopped by a token that is not the end token, the other goes on: nothing is added to the first."""
    chain = {"A": "1", "1": STOP, STOP: "z", "z": "z", "B": "a", **dict(zip("abcdef", "bcdefg", strict=True)), "g": END}
    model = make_chain_model(tmp_path, chain)
    assert run(model, plain(STOP), ["A", "B"]) == [
        [Response("1", 1, True, "1", False)],
        [Response("abcdefg", 7, True, None, False)],
    ]
    without = run(model, plain(), ["A", "B"])
    assert [(row[0].text, row[0].ended) for row in without] == [("1" + "z" * 10, False), ("abcdefg", True)]


def test_a_stop_string_of_several_tokens(tmp_path: Path) -> None:
    chain = {"A": "1", "1": "#", "#": "$", "$": "2", "2": "2", "B": "b", "b": "b"}
    model = make_chain_model(tmp_path, chain)
    assert run(model, plain("#$"), ["A", "B"]) == [
        [Response("1", 1, True, "1", False)],
        [Response("b" * 12, 12, False, None, False)],
    ]


def test_responses_go_to_their_problems(tmp_path: Path) -> None:
    """The harness sorts prompts by length and answers in batches; one prompt is asked twice."""
    chain = {"A": "1", "1": END, "B": "b", "b": "b", "C": "2", "2": "3", "3": END}
    model = make_chain_model(tmp_path, chain)
    questions = ["A", "longer B", "C", "A", "the longest C", "B"]
    expected = {"A": ("1", True), "B": ("b" * 12, False), "C": ("23", True)}
    for batch_size in (1, 2, 4, 8):
        rows = run(model, plain(), questions, batch_size=batch_size)
        assert [(row[0].text, row[0].ended) for row in rows] == [expected[question[-1]] for question in questions]


def test_greedy_responses_are_the_models_own(tmp_path: Path) -> None:
    """A random Llama, compared with a loop over its logits, one prompt at a time."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=3, initializer_range=0.4, **sizes
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    questions = ["abc", "a much longer question", "12 + 34", "Zz"]
    for question, (response,) in zip(questions, run(tmp_path, plain(), questions), strict=True):
        ids = tokenizer(question)["input_ids"]
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != 3:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert response.text == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert response.ended == (ids[-1] == 3)


def test_every_end_token_of_the_model_ends_a_response(tmp_path: Path) -> None:
    """Its generation config may name others than the tokenizer's, as Llama 3's does."""
    chain = {"A": "1", "1": "~", "~": "z", "z": "z", "B": "b", "b": "b"}
    model = make_chain_model(tmp_path, chain)
    config = transformers.GenerationConfig.from_pretrained(model)
    config.update(eos_token_id=[config.eos_token_id, make_tokenizer().convert_tokens_to_ids("~")])
    config.save_pretrained(model)
    rows = run(model, plain(), ["A", "B"])
    assert [(row[0].text, row[0].ended) for row in rows] == [("1~", True), ("b" * 12, False)]


def test_the_models_own_way_of_drawing_is_left_out(tmp_path: Path, sevens: Path) -> None:
    """Its generation config asks for sampling and for what would change greedy responses as well."""
    model = make_chain_model(tmp_path, {"A": "b", "b": ["b", "c"], "c": ["b", "c"]})
    config = transformers.GenerationConfig.from_pretrained(model)
    config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=4)
    config.save_pretrained(model)
    ((response,),) = run(model, plain(), ["A"])
    assert response.text == "b" * 12


def test_sampling_has_no_limit_but_the_temperature(tmp_path: Path) -> None:
    """transformers would draw from the 50 likeliest tokens only; here 90 are equally likely."""
    letters = [chr(code) for code in range(33, 123)]
    model = make_chain_model(tmp_path, {"A": letters})
    draw = Draw(samples=300, temperature=1.0, seed=1, max_new_tokens=1)
    ((*responses,),) = run(model, plain(), ["A"], draw, batch_size=300)
    assert len({response.text for response in responses}) > 75  # 90 (1 - (89/90)^300) = 87 are expected


def test_a_seed_draws_the_same_and_votes_are_counted(tmp_path: Path) -> None:
    model = make_chain_model(tmp_path, {**BOXED_7, "{": ["7", "8"], "8": "}"})
    draw = Draw(samples=5, temperature=0.3, seed=3, max_new_tokens=12)
    state = torch.random.get_rng_state()
    solved = harness(model, read_task("gsm8k"), ["a?", "b?", "c?"], draw).run("gsm8k")
    assert torch.equal(state, torch.random.get_rng_state())
    assert solved == harness(model, read_task("gsm8k"), ["a?", "b?", "c?"], draw).run("gsm8k")
    answers = [[response.answer for response in problem.responses] for problem in solved]
    assert {answer for of_one in answers for answer in of_one} == {"7", "8"}
    assert [problem.right for problem in solved] == [of_one.count("7") > 2 for of_one in answers]
    other = harness(model, read_task("gsm8k"), ["a?", "b?", "c?"], Draw(5, 0.3, 4, 12)).run("gsm8k")
    assert [problem.responses for problem in other] != [problem.responses for problem in solved]


def test_what_a_model_cannot_do(tmp_path: Path, sevens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="--device cuda:99: there is no such device|models run on"):
        Harness(
            str(sevens), None, device="cuda:99", batch_size=1, trust_remote_code=False, progress=False, questions={}
        )
    few = make_chain_model(tmp_path / "few", BOXED_7, max_position_embeddings=16)
    assert run(few, plain(), ["\n"]) == [[Response(r"\boxed{7}", 9, True, "7", True)]]
    assert capsys.readouterr().err == ""
    rows = run(few, plain(), ["long\n"], Draw(samples=1, temperature=0, seed=None, max_new_tokens=20))
    assert rows == [[Response(r"\boxed{7}", 9, True, "7", True)]]
    assert "made for 16 tokens (max_position_embeddings), prompt and response may take 25" in capsys.readouterr().err
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=120, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    ).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="made for 16 tokens .* may take 17: give a smaller --max-new-tokens"):
        harness(tmp_path / "gpt2", plain(), ["12345"])
    endless = make_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "few")
    with pytest.raises(CheckpointError, match="its tokenizer names no end token"):
        harness(tmp_path / "few", plain(), ["?"])


def test_a_bar_counts_the_responses(sevens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(sevens, read_task("gsm8k"), ["3 and 4?", "1 and 1?"], batch_size=1)
    shown = [line for line in re.split(r"[\r\n]+", terminal.getvalue()) if line.strip()]
    assert all(line.startswith("gsm8k: ") for line in shown)
    assert "2/2" in shown[-1] and "response/s" in shown[-1]


def test_the_libraries_say_nothing(
    sevens: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither bars nor warnings where there is no terminal; and what was set stays set."""
    before = logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm, transformers.utils.logging.get_verbosity()
    assert run(sevens, read_task("gsm8k"), ["3 and 4?"])
    assert capfd.readouterr() == ("", "")
    assert "HF_XET_HIGH_PERFORMANCE" not in os.environ
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert before == (
        logging.getLogger("lm_eval").level,
        lm_eval.api.task.tqdm,
        transformers.utils.logging.get_verbosity(),
    )
