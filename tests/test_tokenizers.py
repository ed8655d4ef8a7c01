"""Fine-tunes with another tokenizer: noted, with the ids that the tokenizers library itself reads differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from tiny_models import Models, Run, give_tokenizer

import streammerge
from streammerge import mini_l2s
from streammerge.checkpoints import json_text
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.tokenizers import TOKENIZER, tokenizer_notes

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [Path(copytree(folder, tmp_path / "pair" / folder.name)) for folder in mini_l2s.pair()]


def notes(base: Path, expert: Path) -> list[str]:
    with Checkpoint.open(base, id="base") as ours, Checkpoint.open(expert, id="ft") as theirs:
        return tokenizer_notes(ours, [theirs])


def change(folder: Path, how: Change) -> None:
    values = json.loads((folder / TOKENIZER).read_text())
    how(values)
    (folder / TOKENIZER).write_text(json.dumps(values))


def swap(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]


def rename(values: dict[str, Any]) -> None:
    """As a chat model does with a reserved token: `vocab` and `added_tokens` both have it."""
    values["model"]["vocab"]["<turn>"] = values["model"]["vocab"].pop("<end>")
    values["added_tokens"][1]["content"] = "<turn>"


def add(values: dict[str, Any]) -> None:
    values["added_tokens"].append({**values["added_tokens"][0], "id": 98, "content": "<think>"})


def read_by_the_library(folder: Path) -> dict[int, str]:
    from tokenizers import Tokenizer

    return {number: token for token, number in Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab().items()}


@pytest.mark.parametrize(
    ("how", "example"),
    [
        (swap, "10: '7' in the base, '8' here"),
        (rename, "1: '<end>' in the base, '<turn>' here"),
        (add, "98: nothing in"),
    ],
)
def test_ids_that_mean_another_token_are_noted(pair: list[Path], how: Change, example: str) -> None:
    base, expert = pair
    change(expert, how)
    ours, theirs = read_by_the_library(base), read_by_the_library(expert)
    other = [number for number in theirs if ours.get(number) != theirs[number]]
    assert other
    (note,) = notes(base, expert)
    assert note.startswith(f"ft: {len(other)} of {len(theirs)} token ids mean another token than in the base, such as ")
    assert f"such as {example}" in note and note.endswith("; the output keeps the base's tokenizer")


def test_said_by_plan_merge_and_manifest(pair: list[Path], tmp_path: Path, run: Run) -> None:
    base, expert = pair
    change(expert, swap)
    models = ("--base", base, "--ft", expert, "-m", "linear")
    text = f"{expert}: 2 of 98 token ids mean another token than in the base"
    assert text in run("plan", *models).out
    assert text in run(*models, "--out", tmp_path / "m", "-q").out
    manifest = json.loads((tmp_path / "m" / "streammerge.json").read_text())
    assert [note for note in manifest["notes"] if text in note]
    assert (tmp_path / "m" / TOKENIZER).read_bytes() == (base / TOKENIZER).read_bytes()


def as_unigram(values: dict[str, Any]) -> None:
    pieces = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"] = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in pieces]}


def as_bpe(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    values["model"] = {"type": "BPE", "vocab": vocabulary, "merges": [["1", "0"]]}


def spelt_anew(values: dict[str, Any]) -> None:
    values["truncation"] = None


@pytest.mark.parametrize("how", [as_unigram, as_bpe, spelt_anew])
def test_the_same_tokens_in_another_form_are_not_noted(pair: list[Path], how: Change) -> None:
    base, expert = pair
    change(expert, how)
    assert read_by_the_library(expert) == read_by_the_library(base)
    assert (base / TOKENIZER).read_bytes() != (expert / TOKENIZER).read_bytes() and notes(base, expert) == []


def test_a_unigram_with_other_pieces(pair: list[Path]) -> None:
    base, expert = pair
    for folder in pair:
        change(folder, as_unigram)
    change(expert, lambda values: values["model"]["vocab"].append(["new", -2.0]))
    assert (
        "1 of 99 token ids" in notes(base, expert)[0]
        and "98: nothing in the base, 'new' here" in notes(base, expert)[0]
    )


def test_where_files_are_missing(pair: list[Path], models: Models) -> None:
    base, expert = pair
    (expert / TOKENIZER).unlink()
    assert notes(base, expert) == [] and notes(models.base, models.ft) == []
    give_tokenizer(models.ft)
    brings = "ft: brings vocab.json, the base no tokenizer: the output will have none"
    assert notes(models.base, models.ft) == [brings]
    assert notes(models.ft, models.base) == []


BROKEN: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "no object": ("[]", "not a JSON object"),
    "no model": ("{}", "it has no model.vocab"),
    "a number for a vocabulary": ('{"model": {"vocab": 3}}', "it has no model.vocab"),
    "ids that are none": ('{"model": {"vocab": {"a": "b"}}}', "not of tokens and whole numbers"),
    "a truth for an id": ('{"model": {"vocab": {"a": true}}}', "not of tokens and whole numbers"),
    "pieces that are none": ('{"model": {"vocab": [[]]}}', "not of tokens and whole numbers"),
    "added by no list": ('{"model": {"vocab": {}}, "added_tokens": 1}', "added_tokens are no list"),
    "added without id": ('{"model": {"vocab": {}}, "added_tokens": [{}]}', "not of tokens and whole numbers"),
    "deep": ("[" * 10_000, "not valid JSON"),
}


@pytest.mark.parametrize("broken", ["base", "long"])
@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_noted_and_stops_nothing(
    pair: list[Path], tmp_path: Path, text: str, words: str, broken: str
) -> None:
    (tmp_path / "pair" / broken / TOKENIZER).write_text(text)
    with streammerge.plan({"base": str(pair[0]), "models": [str(pair[1])], "method": "linear"}) as planned:
        (note,) = planned.notes
    assert "its tokenizer was not compared with the base's: model " in note and f"file {TOKENIZER}: " in note
    assert words in note


def test_a_huge_file_is_not_read(pair: list[Path]) -> None:
    base, expert = pair
    with open(expert / TOKENIZER, "r+b") as file:
        file.truncate(json_text.MAX_TEXT_BYTES + 1)
    (note,) = notes(base, expert)
    assert note.endswith(f"model ft, file {TOKENIZER}: larger than {json_text.MAX_TEXT_BYTES} bytes")


def test_a_long_or_hostile_token_is_cut_and_escaped(pair: list[Path]) -> None:
    base, expert = pair
    token = "\x1b[31m\ud800\n" + "x" * 1000
    change(expert, lambda values: values["model"]["vocab"].update({token: values["model"]["vocab"].pop("7")}))
    (note,) = notes(base, expert)
    assert note.isprintable() and len(note) < 300


@pytest.mark.parametrize("revisions", [("c", None), (None, "c")])
def test_nothing_is_fetched_for_it(pair: list[Path], revisions: tuple[str | None, str | None]) -> None:
    base, expert = pair
    change(expert, swap)
    with Checkpoint.open(base, revision=revisions[0]) as ours, Checkpoint.open(expert, revision=revisions[1]) as theirs:
        assert tokenizer_notes(ours, [theirs]) == []
