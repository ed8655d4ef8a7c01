"""The inputs: one seeded draw, or windows of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import assert_close, saved, settings
from tiny_models import tensors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, RecipeError
from streammerge.fisher import fisher
from streammerge.fisher.probes import probe_tokens, random_tokens


def test_random_tokens_are_one_seeded_draw(base: Checkpoint) -> None:
    ids = random_tokens(1000, 8, 64, 42)
    assert torch.equal(ids, torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(42)))
    assert ids.dtype == torch.int64
    assert not torch.equal(ids, random_tokens(1000, 8, 64, 43))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(probe_tokens(base, 1000, settings(samples=8, length=64)), ids)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's numbers are used up"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose tokenizer knows the numbers: "17" is token 17. It begins with token 1 where it may."""
    vocabulary = {str(number): number for number in range(90)} | {"huge": 500, "unknown": 90}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="unknown"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="1 $A", special_tokens=[("1", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(saved(tmp_path / "model", "llama"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("17") == [1, 17]
    return tmp_path / "model"


@pytest.fixture
def model(folder: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint


@pytest.fixture
def text(tmp_path: Path) -> Callable[[int], str]:
    """A file with the numbers from 0 on."""

    def write(count: int) -> str:
        (tmp_path / "text.txt").write_text("\n".join(str(number) for number in range(count)))
        return str(tmp_path / "text.txt")

    return write


@pytest.mark.parametrize(
    ("count", "samples", "length"), [(90, 4, 10), (40, 4, 10), (41, 4, 10), (90, 1, 7), (90, 7, 11), (12, 6, 2)]
)
def test_windows_are_spread_over_the_text(
    model: Checkpoint, text: Callable[[int], str], count: int, samples: int, length: int
) -> None:
    ids = probe_tokens(model, 97, settings(probe_text=text(count), samples=samples, length=length))
    assert ids.shape == (samples, length) and ids.dtype == torch.int64
    starts = ids[:, 0].tolist()
    assert torch.equal(ids, torch.tensor(starts)[:, None] + torch.arange(length)), "each is a piece of the text"
    gaps = [after - before for before, after in pairwise(starts)]
    assert all(gap >= length for gap in gaps), "no overlap"
    assert max(gaps, default=0) - min(gaps, default=0) <= 1, "evenly"
    assert starts[0] == 0 and (samples == 1 or starts[-1] == count - length), "from its beginning to its end"


def refused(model: Checkpoint, error: type[Exception], message: str, **values: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        probe_tokens(model, 97, settings(**{"samples": 4, "length": 10, **values}))
    assert "\n" not in str(caught.value)


def test_a_text_that_is_none_is_refused(model: Checkpoint, text: Callable[[int], str], tmp_path: Path) -> None:
    refused(model, RecipeError, r"--probe-text \S*/missing: No such file", probe_text=str(tmp_path / "missing"))
    refused(model, RecipeError, r"--probe-text \S+: Is a directory", probe_text=str(tmp_path))
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    refused(model, RecipeError, r"--probe-text \S*/latin: not UTF-8", probe_text=str(tmp_path / "latin"))
    refused(model, RecipeError, "39 tokens, and 4 samples of 10 take 40: give a longer text", probe_text=text(39))
    (tmp_path / "empty").write_text("")
    refused(model, RecipeError, "0 tokens, and 4 samples of 10 take 40", probe_text=str(tmp_path / "empty"))


def test_a_token_the_model_does_not_know_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("huge " * 50)
    refused(model, CheckpointError, "gives the id 500, it has 97 tokens", probe_text=str(tmp_path / "text"))


def test_a_model_without_a_tokenizer_is_refused(base: Checkpoint, text: Callable[[int], str]) -> None:
    refused(base, CheckpointError, r"tokenizer.*--probe-text", probe_text=text(50))


def test_a_tokenizer_that_is_broken_is_refused(folder: Path, text: Callable[[int], str]) -> None:
    (folder / "tokenizer.json").write_text("{")
    with Checkpoint.open(folder) as model:
        refused(model, CheckpointError, "its tokenizer, for --probe-text, cannot be loaded", probe_text=text(50))


def test_a_fisher_on_text_is_the_textbook_s_on_its_windows(
    folder: Path, text: Callable[[int], str], tmp_path: Path
) -> None:
    fisher(str(folder), tmp_path / "out", settings(probe_text=text(30), samples=2, length=10), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for start in (0, 20):
        model.zero_grad()
        ids = torch.arange(start, start + 10)[None]
        logits = model(ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad**2 / 2
    assert_close(tensors(tmp_path / "out"), expected)
