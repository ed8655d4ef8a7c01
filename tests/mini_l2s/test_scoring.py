"""Scores of the pair, against generation one token at a time, without padding or cache."""

from pathlib import Path

import pytest
import torch
import transformers

from streammerge import mini_l2s
from streammerge.errors import CheckpointError
from streammerge.mini_l2s import scoring
from streammerge.mini_l2s.grade import extract_answer
from streammerge.mini_l2s.problems import SCORED, scored_problems
from streammerge.sweep.evaluations import find_evaluation

COUNT = 12


def load(folder: Path) -> tuple:
    return (
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
        transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32),
    )


def naive_response(tokenizer, model, question: str, most: int) -> tuple[str, int, bool]:
    """The whole text through the model again for each token."""
    ids = tokenizer(question).input_ids
    response: list[int] = []
    while len(response) < most:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + response])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return " ".join(tokenizer.convert_ids_to_tokens(response)), len(response), True
        response.append(token)
    return " ".join(tokenizer.convert_ids_to_tokens(response)), len(response), False


@pytest.mark.parametrize("name", ["base", "long"])
def test_scores_are_those_of_the_naive_way(name: str) -> None:
    folder = dict(zip(("base", "long"), mini_l2s.pair(), strict=True))[name]
    tokenizer, model = load(folder)
    asked = scored_problems(COUNT)
    truth = [naive_response(tokenizer, model, problem.question, scoring.MAX_NEW_TOKENS) for problem in asked]
    assert scoring.respond(tokenizer, model, [problem.question for problem in asked]) == truth
    result = mini_l2s.score(folder, limit=COUNT, progress=False)
    assert result.pop("seconds") > 0
    assert result == {
        "accuracy": sum(extract_answer(text) == p.answer for (text, _, _), p in zip(truth, asked, strict=True)) / COUNT,
        "mean_length": sum(len(text.split()) for text, _, _ in truth) / COUNT,
        "truncated": 0.0,
        "problems": COUNT,
    }


def test_what_is_cut_off_is_counted_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 tokens are too few for the long model's chains, and enough for the base's answers."""
    base, long = mini_l2s.pair()
    monkeypatch.setattr(scoring, "MAX_NEW_TOKENS", 20)
    result = mini_l2s.score(long, limit=COUNT, progress=False)
    assert (result["accuracy"], result["mean_length"], result["truncated"]) == (0, 20, 1)
    assert mini_l2s.score(base, limit=COUNT, progress=False)["truncated"] == 0


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, long = mini_l2s.pair()
    whole = mini_l2s.score(long, limit=COUNT, progress=False)
    monkeypatch.setattr(scoring, "BATCH", 5)
    parts = mini_l2s.score(long, limit=COUNT, progress=False)
    assert {**whole, "seconds": 0} == {**parts, "seconds": 0}


def test_validation_problems_are_others() -> None:
    base, _ = mini_l2s.pair()
    heldout, validation = (mini_l2s.score(base, limit=200, split=s, progress=False) for s in ("heldout", "validation"))
    assert heldout["problems"] == validation["problems"] == 200
    assert heldout["accuracy"] != validation["accuracy"]


def test_the_end_token_ends_and_is_not_counted() -> None:
    """A response of known tokens: the model is asked what it will say, then only graded."""
    base, _ = mini_l2s.pair()
    tokenizer, model = load(base)
    question = scored_problems(1)[0].question
    [(text, length, ended)] = scoring.respond(tokenizer, model, [question])
    assert ended
    assert length == len(tokenizer(text).input_ids)
    assert tokenizer.eos_token not in text


def test_no_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the limit: a sweep, `mini_l2s.score` and `eval` all ask these."""
    for limit in (SCORED + 50, 10**12):
        assert scored_problems(limit) == scored_problems()
    assert len(scored_problems()) == SCORED == 250
    base, _ = mini_l2s.pair()
    monkeypatch.setattr(
        "streammerge.mini_l2s.scoring.respond", lambda *args, **_: [("answer 0", 2, True)] * len(args[2])
    )
    assert mini_l2s.score(base, limit=300, progress=False)["problems"] == 250
    assert find_evaluation("mini_l2s")(base, limit=300, progress=False)["problems"] == 250


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    base, _ = mini_l2s.pair()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(base / name)
    with pytest.raises(CheckpointError, match="its tokenizer, to be scored with, cannot be loaded: ") as caught:
        mini_l2s.score(tmp_path, limit=1)
    assert "\n" not in str(caught.value)
