"""Does the Fisher rank the decoder blocks alike, whatever it is measured on? On a real model: stories260K.

    python benchmarks/probe_stability.py

measures the Fisher of stories260K (float32) on random tokens with four seeds and on real English text, and prints the
block means, and for every two probes Spearman's rho of the block ranking (and of the ranking of all matrices) and
Pearson's correlation of the log means. To be compared with the paper's claim that random tokens rank the blocks like
real ones (arXiv 2603.21705).

The model and its vocabulary are not part of the project; without them the script says what is missing and exits 1.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streammerge
from streammerge.fisher.store import FisherRecord

TESTS = Path(__file__).resolve().parents[1] / "tests"  # has the reader of the model's own format
SEEDS = (42, 43, 44, 45)
TEXT = "text"


# --- statistics ---------------------------------------------------------------------------------------------------


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, equal values sharing the mean of theirs."""
    return pearson(ranks(left), ranks(right))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def pearson(left: Sequence[float], right: Sequence[float]) -> float:
    """Correlation of two lists; NaN where one is constant."""
    mean_left, mean_right = math.fsum(left) / len(left), math.fsum(right) / len(right)
    covariance = math.fsum((a - mean_left) * (b - mean_right) for a, b in zip(left, right, strict=True))
    spread = math.fsum((a - mean_left) ** 2 for a in left) * math.fsum((b - mean_right) ** 2 for b in right)
    return covariance / math.sqrt(spread) if spread else math.nan


# --- the model ----------------------------------------------------------------------------------------------------


def missing() -> list[str]:
    """The files that are needed and not there."""
    reader = _reader()
    return [path.name for path in (reader.DATA, reader.VOCABULARY) if not path.exists()]


def save_stories(folder: Path) -> Path:
    """stories260K as a checkpoint with a tokenizer that transformers loads, in `folder`; `text.txt` beside it."""
    from transformers import PreTrainedTokenizerFast

    reader = _reader()
    base: Path = reader.save(reader.load_stories(), folder / "stories260K")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>").save_pretrained(base)
    (folder / "text.txt").write_text(reader.TEXT_A + "\n" + reader.TEXT_B, "utf-8")
    return base


def tokenizer() -> Any:
    """The tokenizer of llama2.c: byte-pair merges by score, a space in front, raw bytes for what it does not know.

    A piece is made from any two pieces that give it, the best score first: so every such pair is a merge, in the
    order of the scores.
    """
    from tokenizers import Tokenizer, models, normalizers

    reader = _reader()
    raw, scores = reader._pieces()
    first = reader.FIRST_BYTE + 256  # the ids of real pieces
    pieces = [piece.decode().strip("\n") if number < first else piece.decode() for number, piece in enumerate(raw)]
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces[first:], key=lambda piece: -scores[numbers[piece]])
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    made = Tokenizer(models.BPE(vocab=numbers, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def _reader() -> Any:
    """The module `stories` of the tests."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module("stories")


# --- the probes ---------------------------------------------------------------------------------------------------


def measure(base: Path, folder: Path, seeds: Sequence[int] = SEEDS) -> dict[str, FisherRecord]:
    """The Fisher of the model on random tokens of each seed and on `text.txt`, by the name of the probe."""
    probes: dict[str, dict[str, Any]] = {f"seed {seed}": {"seed": seed} for seed in seeds}
    probes[TEXT] = {"probe_text": str(base.parent / "text.txt")}
    records = {}
    for name, values in probes.items():
        settings = streammerge.FisherSettings.model_validate({"dtype": "float32", **values})
        records[name] = streammerge.fisher(str(base), folder / name, settings, device="cpu")
    return records


def block_means(record: FisherRecord) -> list[float]:
    return [block.mean for block in record.blocks]


def matrix_means(record: FisherRecord) -> list[float]:
    """Of every matrix of the decoder blocks, in one order."""
    return [record.tensors[name].mean for name in sorted(record.tensors)]


def compare(left: FisherRecord, right: FisherRecord) -> tuple[float, float, float]:
    """Spearman's rho of the blocks, of the matrices, and Pearson's correlation of the blocks' log means."""
    logs = [[math.log(mean) for mean in block_means(record)] for record in (left, right)]
    blocks = spearman(block_means(left), block_means(right))
    return blocks, spearman(matrix_means(left), matrix_means(right)), pearson(*logs)


def tables(records: Mapping[str, FisherRecord]) -> str:
    """Markdown: the block means of each probe; what every two probes have in common."""
    count = len(next(iter(records.values())).blocks)
    rows = [["probe", "loss per sequence", *(f"block {block}" for block in range(count)), "ranking", "max / min"]]
    for name, record in records.items():
        means = block_means(record)
        ranking = " > ".join(str(block) for block in sorted(range(count), key=lambda block: -means[block]))
        ratio = f"{max(means) / min(means):.1f}"
        rows.append([name, f"{record.loss:.1f}", *(f"{mean:.3e}" for mean in means), ranking, ratio])
    pairs = [["probes", "Spearman, blocks", "Spearman, matrices", "Pearson, log block means"]]
    for left, right in itertools.combinations(records, 2):
        pairs.append([f"{left}, {right}", *(f"{value:.3f}" for value in compare(records[left], records[right]))])
    return f"{_markdown(rows)}\n\n{_markdown(pairs)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the model and the Fishers here; must be new")
    out = parser.parse_args(argv).out
    if absent := missing():
        print(f"error: stories260K is not here: {' and '.join(absent)} (tests/stories.py says where)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(tables(measure(save_stories(folder), folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
