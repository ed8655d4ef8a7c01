"""Training: what a batch holds, that a seed repeats to the bit, and the loss against a plain one."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from mini_l2s import train
from torch.nn.functional import cross_entropy

from streammerge.mini_l2s.problems import BASE, LONG
from streammerge.mini_l2s.tokenizer import END, make_tokenizer

TOKENIZER = make_tokenizer()
SMALL = train.Training(steps=2, rate=1e-3, batch=8, warm_up=1)


def test_a_batch_is_of_training_problems() -> None:
    [rows] = islice(train.batches(TOKENIZER, SMALL, LONG, 0), 1)
    assert len(rows) == 8
    for ids, asked in rows:
        text = TOKENIZER.decode(ids)
        assert text.endswith(END) and "how many" in text
        assert TOKENIZER.decode(ids[asked - 1]) == "?"
    assert [len(ids) for ids, _ in rows] == sorted(len(ids) for ids, _ in rows)


def test_the_loss_is_the_mean_over_the_responses_tokens() -> None:
    """In one padded piece, position by position."""
    model = train.make_model(TOKENIZER, 0)
    [rows] = islice(train.batches(TOKENIZER, replace(SMALL, batch=16), BASE, 0), 1)
    losses = []
    for ids, asked in rows:
        logits = model(torch.tensor([ids])).logits[0]
        losses += [cross_entropy(logits[place - 1], torch.tensor(ids[place])) for place in range(asked, len(ids))]
    truth = torch.stack(losses).mean()
    truth.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert train.step_backwards(model, rows) == pytest.approx(truth.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6)


def test_the_rate_rises_and_falls() -> None:
    training = train.Training(steps=1000, rate=2.0, warm_up=10)
    assert training.rate_at(0) == pytest.approx(0.2)
    assert training.rate_at(10) == pytest.approx(2.0, rel=1e-3)
    assert training.rate_at(500) == pytest.approx(2 * (0.05 + 0.95 / 2))
    assert training.rate_at(999) == pytest.approx(0.1, rel=1e-3)


def test_a_seed_repeats_to_the_bit_on_any_number_of_threads(tmp_path: Path) -> None:
    stages = [("base", SMALL, BASE), ("long", SMALL, LONG)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        record = train.make_pair(3, tmp_path / str(threads), stages, limit=2)
    torch.set_num_threads(1)
    train.make_pair(4, tmp_path / "other", stages, limit=2)
    for name in ("base", "long"):
        one, two, other = (tmp_path / run / name / "model.safetensors" for run in ("1", "2", "other"))
        assert one.read_bytes() == two.read_bytes()
        assert one.read_bytes() != other.read_bytes()
        assert "--seed 3" in (tmp_path / "1" / name / "README.md").read_text()
    assert record["base"]["scores"]["problems"] == 2
