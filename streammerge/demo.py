"""A small pair of models made on the spot, their merge, and what each of the three answers. Offline, on the CPU.

The base answers sums tersely; the fine-tuned model, trained on from it, says the sum before it answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from streammerge.checkpoints.output import check_output
from streammerge.errors import OutputExistsError, TransferError
from streammerge.merge import merge
from streammerge.progress import progress_bar
from streammerge.report import block_rows, table
from streammerge.workers import single_threaded_torch

MARKER = ".streammerge-demo"
SUMS = [(a, b) for a in range(10) for b in range(10)]
SHOWN = [(2, 3), (7, 5), (9, 8)]
TERSE = [f"Q: {a}+{b}? A: {a + b}.\n" for a, b in SUMS]
ASKED_ALOUD = [f"Q: {a}+{b}, aloud? A: {a}+{b} is {a + b}. So {a + b}.\n" for a, b in SUMS]
ALWAYS_ALOUD = [f"Q: {a}+{b}? A: {a}+{b} is {a + b}. So {a + b}.\n" for a, b in SUMS]
BATCH = 32


def run(out: Path, *, progress: bool = True, steps: int = 300) -> dict[str, Any]:
    """Make `out/base` and `out/ft`, merge them with FIM-TIES into `out/merged`, and print what came out.

    An earlier demo in `out` is replaced, file by file; anything else there is left alone.

    Args:
        out: a folder that is new, empty, or of an earlier demo.
        progress: show progress bars on standard error.
        steps: training steps of the base; the fine-tuning takes a third of them.

    Returns:
        The manifest of the merge.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    base, ft, merged = (out / name for name in ("base", "ft", "merged"))
    tuning = max(steps // 3, 1)
    _claim(out, merged)
    # On a busy machine, matrices this small lose more by waiting for a second thread than they gain from it.
    with _quiet(), single_threaded_torch():
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        size = sum(parameter.numel() for parameter in model.parameters())
        loss = train(model, tokenizer, TERSE + ASKED_ALOUD, steps, 3e-3, "base", progress)
        print(f"Two models of {size:,} parameters ({type(model).__name__}):")
        print(f"base: trained {steps} steps to answer sums tersely, or aloud if asked to; last loss {loss:.4f}")
        _save(model, tokenizer, base)
        loss = train(model, tokenizer, ALWAYS_ALOUD, tuning, 3e-4, "fine-tuning", progress)
        print(f"ft:   the base, trained {tuning} steps more to answer aloud always; last loss {loss:.4f}\n")
        _save(model, tokenizer, ft)
        recipe = {"base": str(base), "models": [str(ft)], "method": "fim_ties"}
        result = merge(recipe, merged, device="cpu", overwrite=True, progress=progress)
        print(table(*block_rows(result)), end="\n\n")
        print(table(*_answer_rows([base, ft, merged])), end="\n\n")
    print(f"The three models are in {out}; the merge is {merged}")
    return result


def make_tokenizer() -> Any:
    """One token per character; a line ends the text."""
    characters = sorted(set("".join(ASKED_ALOUD)))
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="\n"
    )


def make_model(tokenizer: Any) -> Any:
    """A Llama decoder of four blocks with seeded random weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def train(
    model: Any, tokenizer: Any, lines: Sequence[str], steps: int, rate: float, label: str, progress: bool
) -> float:
    """Train in place on random lines with a falling rate; the last step's loss."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loss = torch.tensor(torch.nan)
    with progress_bar(steps, label, "step", progress) as bar:
        for _ in range(steps):
            ids, labels = _batch(tokenizer, draw.choices(lines, k=BATCH))
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return loss.item()


def _batch(tokenizer: Any, lines: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids, and labels for the answers alone."""
    ids = tokenizer(lines, padding=True, return_tensors="pt").input_ids
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, line in zip(labels, lines, strict=True):
        row[: line.index("A:") + 2] = -100
    return ids, labels


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _answers(folder: Path) -> list[str]:
    """What the saved model answers to every sum, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = tokenizer([f"Q: {a}+{b}? A:" for a, b in SUMS], return_tensors="pt")  # all of one length
    output = model.generate(**prompts, max_new_tokens=32, do_sample=False)
    return [text.strip() for text in tokenizer.batch_decode(output[:, prompts.input_ids.shape[1] :], True)]


def _answer_rows(folders: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Header and a row per model: some answers, the sums whose answer ends with the right number, the mean length."""
    rows = []
    for folder in folders:
        answers = dict(zip(SUMS, _answers(folder), strict=True))
        right = sum(re.findall(r"\d+", answer)[-1:] == [str(a + b)] for (a, b), answer in answers.items())
        length = sum(map(len, answers.values())) / len(answers)
        rows.append([folder.name, *(answers[pair] for pair in SHOWN), f"{right} of {len(answers)}", f"{length:.1f}"])
    return ["model", *(f"Q: {a}+{b}? A:" for a, b in SHOWN), "right", "characters"], rows


def _claim(out: Path, merged: Path) -> None:
    """Mark `out` as the demo's; refuse it where it holds something else."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"output {out} is a file: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / MARKER).exists():
            raise OutputExistsError(f"output folder {out} holds no earlier demo, but other files: choose another --out")
        check_output(merged, [], overwrite=True)
        (out / MARKER).touch()
    except OSError as error:
        raise TransferError(f"{out}: cannot be written: {error.strerror}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal, for a while."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
