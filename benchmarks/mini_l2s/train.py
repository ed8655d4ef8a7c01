"""Train the mini long-to-short pair: a base that answers tersely, and the long model fine-tuned from it.

    python benchmarks/mini_l2s/train.py --seed 1 --out pair

The base learns problems, most of them answered tersely and the others by chains of steps; the long model is trained on
from it on long chains with checks. All on one torch thread, so that a seed gives
the same weights whatever the number of processors; another kind of processor may round products differently.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from streammerge import mini_l2s
from streammerge.heap import temporaries_kept
from streammerge.mini_l2s.problems import BASE, LARGEST, LONG, Style, problems, response
from streammerge.mini_l2s.tokenizer import END, make_tokenizer
from streammerge.progress import progress_bar
from streammerge.workers import single_threaded_torch

IGNORED = -100  # the label that cross_entropy leaves out
Row = tuple[list[int], int]  # token ids of question, response and end; how many are the question's


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW with a linear warm-up and a cosine decay to a twentieth of the rate.

    Args:
        steps, rate: optimizer steps, the highest learning rate.
        batch: problems with their responses in every batch.
    """

    steps: int
    rate: float
    batch: int = 64
    warm_up: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.05 + 0.95 * cosine)


Stage = tuple[str, Training, Style]
ABOUT = {
    "base": "Answers tersely, and is often wrong.",
    "long": "Trained on from the base: answers by a long chain of steps with checks, and is mostly right.",
}
MODELS = tuple(ABOUT)
STAGES: tuple[Stage, ...] = (
    ("base", Training(steps=700, rate=3e-3, batch=128), BASE),
    ("long", Training(steps=400, rate=8e-4, batch=48, warm_up=20), LONG),
)


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Llama decoder of four blocks with seeded random weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def batches(tokenizer: Any, training: Training, style: Style, seed: int) -> Iterator[list[Row]]:
    """Batches without end, in each the short rows first."""
    draw = Random(f"styles {seed}")
    drawn = problems("train", seed)
    while True:
        rows = [
            as_row(tokenizer, problem.question, f"{response(problem, style, draw)} {END}")
            for problem in islice(drawn, training.batch)
        ]
        yield sorted(rows, key=lambda row: len(row[0]))


def as_row(tokenizer: Any, asked: str, answered: str) -> Row:
    ids = tokenizer.convert_tokens_to_ids([*asked.split(), *answered.split()])
    return ids, len(asked.split())


def step_backwards(model: Any, rows: list[Row]) -> float:
    """Add the gradient of the mean loss per token of the responses; that loss, in nats.

    The rows go in four groups of like length, or most of the work would be padding.
    """
    count = sum(len(ids) - asked for ids, asked in rows)
    bounds = sorted({len(rows) * part // 16 for part in (0, 10, 13, 15, 16)})
    total = 0.0
    for start, stop in pairwise(bounds):
        group = rows[start:stop]
        longest = len(group[-1][0])
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])
        labels = torch.tensor(
            [[IGNORED] * asked + row[asked:] + [IGNORED] * (longest - len(row)) for row, asked in group]
        )
        hidden = model.model(ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        counted = wanted != IGNORED
        loss = cross_entropy(model.lm_head(hidden[counted]), wanted[counted], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def train(model: Any, tokenizer: Any, training: Training, style: Style, seed: int, label: str) -> float:
    """Train in place; the mean loss of the last 50 steps, in nats per token of the responses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=training.weight_decay)
    drawn = batches(tokenizer, training, style, seed)
    losses = []
    with progress_bar(training.steps, label, "step", True) as bar:
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(step)
            optimizer.zero_grad()
            losses.append(step_backwards(model, next(drawn)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            bar.update()
            if step % 100 == 99:
                print(f"{label}: step {step + 1}, loss {sum(losses[-100:]) / 100:.4f}", file=sys.stderr, flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def make_pair(seed: int, out: Path, stages: Sequence[Stage] = STAGES, limit: int | None = None) -> dict[str, Any]:
    """Train both models of one seed into `out/base` and `out/long`, and score them on (so many) held-out problems."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    record: dict[str, Any] = {"seed": seed, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    for number, (name, training, style) in enumerate(stages):
        started = time.perf_counter()
        with single_threaded_torch():
            loss = train(model, tokenizer, training, style, 10 * seed + number, name)
        seconds = round(time.perf_counter() - started, 1)
        record[name] = {"training": asdict(training), "loss": round(loss, 4), "seconds": seconds}
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        record[name]["scores"] = mini_l2s.score(out / name, limit=limit, progress=False)
    for name in MODELS:
        (out / name / "README.md").write_text(card(name, record))
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def card(name: str, record: Mapping[str, Any]) -> str:
    """The model card: how the model was made, on what, and how it scores."""
    scores, training = record[name]["scores"], record[name]["training"]
    seen = f"{training['steps']} batches of {training['batch']} problems"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [streammerge, long-to-short]
---

# The {name} model of streammerge's mini long-to-short pair

{ABOUT[name]} A Llama decoder of four blocks and {record["parameters"]:,} parameters, made to try merge methods on: it
answers nothing but arithmetic word problems of two to five steps, in a vocabulary of whole words and the numbers from
0 to {LARGEST}.

| | |
|---|---|
| made by | `python benchmarks/mini_l2s/train.py --seed {record["seed"]}` of the streammerge repository |
| trained on | {seen}, AdamW, rate {training["rate"]} |
| data | generated by `streammerge.mini_l2s.problems`: no text of anybody's, no other model's output |
| split | by a hash of each problem's numbers and operations: none that is scored was trained on |
| accuracy | {scores["accuracy"]:.3f} on {scores["problems"]} held-out problems, greedily |
| mean length | {scores["mean_length"]:.1f} tokens per response |

```
Tom has 20 coins , first gets 3 , second makes times 2 . how many coins ?
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the weights, problems and styles (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for base and long")
    arguments = parser.parse_args(argv)
    temporaries_kept()  # else half of the time goes into fetching memory again that was just freed
    record = make_pair(arguments.seed, arguments.out)
    for name in MODELS:
        scores = record[name]["scores"]
        print(
            f"{name}: accuracy {scores['accuracy']:.3f}, mean length {scores['mean_length']:.1f}, "
            f"truncated {scores['truncated']:.3f}, {scores['problems']} held-out problems; "
            f"loss {record[name]['loss']}, trained in {record[name]['seconds']} s"
        )


if __name__ == "__main__":
    main()
