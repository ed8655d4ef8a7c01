"""The real small weights: loaded right, tokenized right, trained further."""

from pathlib import Path

import pytest
import stories
import torch
from naive import naive_fisher
from transformers import LlamaForCausalLM

pytestmark = stories.needed


def test_tokenizer() -> None:
    text = "Once upon a time, there was a little girl named Lily."
    assert stories.decode(stories.encode(text)) == text
    assert stories.encode("a") == [stories.BOS, 261] and stories.encode("") == [stories.BOS]
    odd = "naïve 東 \t"
    assert stories.decode(stories.encode(odd)) == odd


def test_nats_per_token() -> None:
    """papers.md 5: 0.100 on the classic opening (1.39 if the q and k rows were left interleaved).

    Its 18.6 on random ids names no draw: 8 x 64 ids give 18.0 +- 0.33 over 200 seeds, and the specified one 18.54.
    """
    model = stories.load_stories()
    opening = stories.text_loss(model, "Once upon a time, there was a little girl named Lily.")
    assert opening == pytest.approx(0.1001, abs=2e-4)
    fisher, loss = naive_fisher(model)
    assert loss / 63 == pytest.approx(18.540, abs=2e-3)
    assert all(torch.isfinite(f).all() for f in fisher.values()) and "lm_head.weight" not in fisher


def test_bfloat16() -> None:
    assert {p.dtype for p in stories.load_stories(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_training_is_deterministic_and_leaves_the_base_alone() -> None:
    base = stories.load_stories()
    one, two = (stories.train_further(base, stories.TEXT_A, steps=3).state_dict() for _ in range(2))
    fresh = stories.load_stories().state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(one[name], two[name]) and not torch.equal(one[name], tensor)
        assert torch.equal(tensor, fresh[name])


def test_pair_and_expert(tmp_path: Path) -> None:
    base_dir, ft_dir = stories.make_pair(tmp_path, steps=60)
    expert_dir = stories.make_expert(tmp_path / "expert", steps=60)
    base, ft, expert = (LlamaForCausalLM.from_pretrained(d) for d in (base_dir, ft_dir, expert_dir))
    assert torch.equal(base.lm_head.weight, stories.load_stories().model.embed_tokens.weight)
    assert stories.text_loss(ft, stories.TEXT_A) < stories.text_loss(base, stories.TEXT_A) - 0.5
    assert stories.text_loss(expert, stories.TEXT_B) < stories.text_loss(base, stories.TEXT_B) - 0.5
