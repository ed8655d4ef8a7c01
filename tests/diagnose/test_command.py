"""`streammerge diagnose`: what it prints, the tokens it takes, the figures, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tiny_models import MATRIX, Models, Result, Run, content, edit_config, give_tokenizer, put, spoil, tensors

import streammerge
from streammerge.diagnose import plot
from streammerge.errors import RecipeError
from streammerge.fisher.feed import BlockFeed
from streammerge.fisher.probes import random_tokens


def collapse(models: Models, run: Run, *options: object) -> Result:
    pair = ("--against", models.base, "--against", models.ft2)
    return run("diagnose", models.ft, *pair, "-q", "--device", "cpu", *options)


def nonlinearity(models: Models, run: Run, *options: object) -> Result:
    return run("diagnose", models.ft, "--against", models.base, "--nonlinearity", "-q", "--device", "cpu", *options)


# --- what it prints -----------------------------------------------------------------------------------------------


def test_the_table_of_a_merge(models: Models, run: Run) -> None:
    result = collapse(models, run)
    assert (result.code, result.err) == (0, "")
    told = json.loads(collapse(models, run, "--json").out)
    header, rule, *rows, last, blank, proxy, words, what = result.out.splitlines()
    heads = ["block", "variance", "/ sources", "effective rank", "/ sources", "norm shrinkage", "angle^2"]
    assert (re.split(r"  +", header), set(rule), blank) == (heads, {"-", " "}, "")
    keys = ("activation_variance", "variance_ratio", "effective_rank", "rank_ratio", "norm_shrinkage")
    for line, row in zip((*rows, last), (*told["blocks"], {"block": "mean", **told["mean"]}), strict=True):
        cells = line.split()
        assert cells[0] == str(row["block"])
        wanted = [row[key] for key in (*keys, "mean_squared_angle")]
        assert [float(cell) for cell in cells[1:]] == pytest.approx(wanted, rel=1e-3)
    assert proxy.endswith(f": {told['proxy_objective']:.4e} rad^2")
    assert words.startswith("Collapse shows as ratios well below 1: ")
    assert "(0.71 for the plain mean of 2 models that share nothing)" in words
    expected = (
        f"{models.ft} against {models.base} and {models.ft2}: 8 sequences of 64 tokens, random tokens; float32 on cpu"
    )
    assert what == expected


def test_json_is_what_the_library_returns(models: Models, run: Run) -> None:
    sources = [str(models.base), str(models.ft2)]
    settings = {"samples": 3, "length": 9, "seed": 1, "rank": "singular", "compute_dtype": "float64"}
    options = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    printed = json.loads(collapse(models, run, "--json", *options).out)
    assert printed == streammerge.diagnose(str(models.ft), sources, settings, device="cpu")
    assert printed["settings"] == {**settings, "text": None, "text_field": "text", "nonlinearity": False, "alpha": 0.5}
    ids = random_tokens(48, 3, 9, 1)
    assert printed["tokens"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert printed["model"] == {"id": str(models.ft), "revision": None}
    assert [source["id"] for source in printed["against"]] == sources
    assert (printed["compute_dtype"], printed["device"]) == ("float64", "cpu")
    assert printed["version"] == streammerge.__version__


def test_the_table_of_a_fine_tune(models: Models, run: Run) -> None:
    result = nonlinearity(models, run, "--alpha", "0.25")
    assert (result.code, result.err) == (0, "")
    told = json.loads(nonlinearity(models, run, "--alpha", "0.25", "--json").out)
    header, _, *rows, last, blank, correlation, what = result.out.splitlines()
    assert re.split(r"  +", header) == ["block", "nonlinearity", "relative merging error", "change"]
    for line, row in zip((*rows, last), (*told["blocks"], {"block": "mean", **told["mean"]}), strict=True):
        wanted = [row[key] for key in ("nonlinearity", "relative_merging_error", "change")]
        assert [float(cell) for cell in line.split()[1:]] == pytest.approx(wanted, rel=1e-2)
    assert correlation == f"Pearson correlation of nonlinearity and relative merging error: {told['pearson']:.3f}"
    assert what.startswith(f"from {models.base} to {models.ft} at alpha 0.25: 8 sequences")
    assert (told["settings"]["alpha"], told["model"]["id"], blank) == (0.25, str(models.ft), "")


def test_an_undefined_correlation_is_said_and_no_number(models: Models, run: Run) -> None:
    same = Models(models.base, models.base, models.ft2)
    result = nonlinearity(same, run)
    assert "Pearson" not in result.out and "nan" not in result.out
    assert result.out.splitlines()[-1] == "note: the correlation is undefined: 0 block(s) to correlate, which takes two"
    assert json.loads(nonlinearity(same, run, "--json").out)["pearson"] is None


def test_a_single_source_may_be_a_plain_name(models: Models) -> None:
    result = streammerge.diagnose(str(models.ft), str(models.base), {"samples": 2, "length": 8}, device="cpu")
    assert [len(row["source_norms"]) for row in result["blocks"]] == [1, 1]


# --- tokens -------------------------------------------------------------------------------------------------------


def letters(text: str) -> torch.Tensor:
    return torch.tensor([ascii_lowercase.index(letter) for letter in text])


@pytest.mark.parametrize(
    ("name", "written", "options"),
    [("text", "abcdefghij", ()), ("text.jsonl", '{"body": "abcdefghij"}\n', ("--text-field", "body"))],
)
def test_a_text_is_cut_into_windows(
    models: Models, tmp_path: Path, run: Run, name: str, written: str, options: tuple[str, ...]
) -> None:
    """The tokenizer of MODEL reads it, and with --nonlinearity that of its base."""
    (tmp_path / name).write_text(written)
    ids = torch.stack([letters("abcd"), letters("ghij")])
    given = ("--text", tmp_path / name, "--samples", 2, "--length", 4, *options)
    give_tokenizer(models.ft)
    printed = json.loads(collapse(models, run, *given, "--json").out)
    assert printed["tokens"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert f"2 sequences of 4 tokens, the text {tmp_path / name}; " in collapse(models, run, *given).out
    assert f"model {models.base}: it brings no tokenizer, which --text needs" in nonlinearity(models, run, *given).err
    give_tokenizer(models.base)
    assert json.loads(nonlinearity(models, run, *given, "--json").out)["tokens"] == printed["tokens"]


# --- figures ------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[12:16] == b"IHDR"
    return struct.unpack(">II", raw[16:24])


def test_the_figure_of_a_merge(models: Models, tmp_path: Path, run: Run) -> None:
    result = collapse(models, run, "--plot", tmp_path / "c.png")
    assert (result.code, result.err) == (0, "")
    assert png_size(tmp_path / "c.png") == (1050, 1050)
    assert result.out == collapse(models, run).out


def test_the_figure_of_a_fine_tune(models: Models, tmp_path: Path, run: Run) -> None:
    for name, start in (("n.png", b"\x89PNG"), ("n.pdf", b"%PDF"), ("n.SVG", b"<?xml")):
        result = nonlinearity(models, run, "--plot", tmp_path / name)
        assert (result.code, result.err) == (0, "")
        assert (tmp_path / name).read_bytes().startswith(start)
    assert png_size(tmp_path / "n.png") == (1650, 750)


def test_undefined_numbers_are_gaps_in_a_figure(models: Models, tmp_path: Path) -> None:
    settings = {"samples": 2, "length": 8, "nonlinearity": True}
    result = streammerge.diagnose(str(models.ft), str(models.base), settings, device="cpu")
    for row in result["blocks"]:
        row["nonlinearity"] = None
    result |= {"pearson": None, "correlated_blocks": []}
    plot.write_plot(result, tmp_path / "n.png")
    assert png_size(tmp_path / "n.png") == (1650, 750)


# --- what it refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a decoder block is read."""

    def never(self: BlockFeed, *args: Any) -> None:
        raise AssertionError("a block is read")

    monkeypatch.setattr(BlockFeed, "__init__", never)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no such model": (("{no}", "--against", "{base}"), "model {no}: there is no such folder"),
    "no such source": (("{ft}", "--against", "{no}"), "model {no}: there is no such folder"),
    "two bases": (("{ft}", "--against", "{base}", "--against", "{ft2}", "--nonlinearity"), "takes one --against"),
    "alpha alone": (("{ft}", "--against", "{base}", "--alpha", "0"), "--alpha says nothing without --nonlinearity"),
    "rank beside": (
        ("{ft}", "--against", "{base}", "--nonlinearity", "--rank", "singular"),
        "--rank says nothing with --nonlinearity",
    ),
    "field alone": (("{ft}", "--against", "{base}", "--text-field", "a"), "--text-field says nothing without --text"),
    "alpha": (("{ft}", "--against", "{base}", "--nonlinearity", "--alpha", "1.5"), "--alpha 1.5: must be at most 1"),
    "rank": (("{ft}", "--against", "{base}", "--rank", "full"), "--rank full: must be 'eigenvalues' or 'singular'"),
    "samples": (("{ft}", "--against", "{base}", "--samples", "0"), "--samples 0: must be at least 1"),
    "length": (("{ft}", "--against", "{base}", "--length", "1"), "--length 1: must be at least 2"),
    "seed": (("{ft}", "--against", "{base}", "--seed", "9" * 30), "--seed 999"),
    "dtype": (("{ft}", "--against", "{base}", "--compute-dtype", "int8"), "--compute-dtype int8: must be 'bfloat16',"),
    "device": (("{ft}", "--against", "{base}", "--device", "warp"), "--device warp: there is no such device here"),
    "meta": (("{ft}", "--against", "{base}", "--device", "meta"), "--device meta: models run on cpu or cuda"),
    "no text": (("{ft}", "--against", "{base}", "--text", "{no}"), "--text {no}: No such file"),
    "short text": (("{ft}", "--against", "{base}", "--text", "{text}"), "26 tokens, and 8 samples of 64 take 512"),
    "no field": (("{ft}", "--against", "{base}", "--text", "{jsonl}"), "(it has body): --text-field"),
    "no JSONL": (("{ft}", "--against", "{base}", "--text", "{bad}"), "--text {bad}, line 1: not valid JSON"),
    "code": (("{ft}", "--against", "org/name", "--trust-remote-code"), "--trust-remote-code: pin org/name"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_a_weight_is_read(
    models: Models, tmp_path: Path, run: Run, arguments: tuple[str, ...], words: str
) -> None:
    give_tokenizer(models.ft)
    files = {"text": ascii_lowercase, "jsonl": '{"body": "a"}', "bad": "abc"}
    for name, text in files.items():
        (tmp_path / (name if name == "text" else f"{name}.jsonl")).write_text(text)
    places = {name: tmp_path / (name if name == "text" else f"{name}.jsonl") for name in files}
    places |= {**models._asdict(), "no": tmp_path / "no"}
    before = content(tmp_path)
    result = run("diagnose", *(argument.format(**places) for argument in arguments))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith("streammerge: error: ") and words.format(**places) in result.err
    assert content(tmp_path) == before


def more_blocks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    for name, value in tensors(folder).items():
        if ".layers.1." in name:
            put(folder, name.replace(".1.", ".2."), value)


def quantised(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (lambda folder: edit_config(folder, model_type="llama"), "config model_type is 'llama'"),
    "another number of blocks": (more_blocks, "config num_hidden_layers is 3, in the base 2"),
    "another shape": (lambda folder: put(folder, MATRIX, torch.ones(3, 16)), f"{MATRIX!r} is [3, 16]"),
    "quantised": (quantised, "quantised (gptq)"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("command", [collapse, nonlinearity])
@pytest.mark.parametrize(("change", "words"), UNFIT.values(), ids=UNFIT)
def test_models_that_do_not_fit(
    models: Models, run: Run, command: Callable[..., Result], change: Callable[[Path], object], words: str
) -> None:
    change(models.ft)
    result = command(models, run)
    assert (result.code, result.out) == (1, "")
    first, *others = result.err.splitlines()
    assert first.startswith("streammerge: error: ") and words in result.err
    assert all(line.startswith("  - ") for line in others)
    if others or "quantised" not in words:
        assert f"these models cannot be compared with {models.base}:" in first


@pytest.mark.parametrize("command", [collapse, nonlinearity])
def test_a_weight_that_is_no_number(models: Models, run: Run, command: Callable[..., Result]) -> None:
    spoil(models.ft, MATRIX, torch.nan)
    result = command(models, run)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert f"model {models.ft}" in result.err and "1 non-finite values" in result.err


def test_no_source_is_a_usage_error(models: Models, run: Run) -> None:
    result = run("diagnose", models.ft)
    assert (result.code, result.out) == (2, "") and "--against" in result.err
    with pytest.raises(RecipeError, match="give the models that it was merged from"):
        streammerge.diagnose(str(models.ft), [])


@pytest.mark.usefixtures("unread")
def test_a_figure_without_matplotlib(models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "can_draw", lambda: False)
    result = collapse(models, run, "--plot", tmp_path / "c.png")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert (
        "--plot needs matplotlib, which is not installed: pip install -c constraints.txt '.[plot]' in the checkout"
        in result.err
    )


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "words"),
    [("c.gif", "must end with .png, .pdf or .svg"), ("no/c.png", "there is no folder"), ("dir.png", "is a folder")],
)
def test_a_figure_that_cannot_be_made(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(plot, "can_draw", lambda: True)
    (tmp_path / "dir.png").mkdir()
    result = collapse(models, run, "--plot", tmp_path / name)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert f"--plot {tmp_path / name}: " in result.err and words in result.err
