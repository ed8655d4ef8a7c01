"""A Fisher that does not fit, and passes over the model that cannot be made."""

from pathlib import Path
from shutil import copytree, rmtree
from string import ascii_lowercase

import pytest
import torch
from bad_input.faults import cut, edit_record
from bad_input.refusals import TASK_ARITHMETIC, Spoil, command, refused
from tiny_models import MATRIX, WEIGHTS, Models, Run, content, edit, give_tokenizer, put, spoil

from streammerge.checkpoints.work import WorkFolder

NO_FISHER: dict[str, tuple[Spoil, list[str]]] = {
    "no folder": (rmtree, ["Fisher {fisher}: there is no fisher.json; make one with: streammerge fisher"]),
    "no record": (lambda f: (f / "fisher.json").unlink(), ["Fisher {fisher}: there is no fisher.json"]),
    "record no JSON": (lambda f: (f / "fisher.json").write_text("{"), ["Fisher {fisher}, file fisher.json: not valid"]),
    "record no mapping": (lambda f: (f / "fisher.json").write_text("[1]"), ["Fisher {fisher}, file fisher.json: "]),
    "record without loss": (
        lambda f: edit_record(f, lambda record: record.pop("loss")),
        ["Fisher {fisher}, file fisher.json: loss is missing"],
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["model Fisher {fisher}: no safetensors file"]),
    "cut": (cut(-1), ["model Fisher {fisher}, file model.safetensors: truncated"]),
    "a tensor less": (
        lambda f: edit(f, lambda state: state.pop(MATRIX)),
        ["Fisher {fisher} ", f"'{MATRIX}' is missing"],
    ),
    "a tensor less in the record": (
        lambda f: edit_record(f, lambda record: record["tensors"].pop(MATRIX)),
        ["Fisher {fisher} does not fit this merge", f"tensor '{MATRIX}' is missing"],
    ),
    "another shape": (
        lambda f: put(f, MATRIX, torch.ones(16, 32)),
        ["Fisher {fisher} does not fit this merge", f"tensor '{MATRIX}' is [16, 32], in the base [32, 16]"],
    ),
    "integers": (
        lambda f: put(f, MATRIX, torch.ones(32, 16, dtype=torch.int32)),
        ["Fisher {fisher} does not fit this merge", f"tensor '{MATRIX}' is I32, not floating"],
    ),
    "NaN": (
        lambda f: spoil(f, MATRIX, torch.nan),
        ["model Fisher {fisher}, file model.safetensors: tensor", MATRIX, "non-finite"],
    ),
}


@pytest.mark.parametrize(("change", "words"), NO_FISHER.values(), ids=NO_FISHER)
def test_a_broken_fisher(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, change: Spoil, words: list[str]
) -> None:
    fisher = Path(copytree(saved_fisher, tmp_path / "fisher"))
    change(fisher)
    arguments = command(models, tmp_path, "--fisher", fisher)
    refused(run, tmp_path, arguments, *(word.format(fisher=fisher) for word in words))


SETTINGS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "samples": (("--fisher-samples", "4"), ["samples is 8, asked for 4"]),
    "length": (("--fisher-length", "32"), ["length is 64, asked for 32"]),
    "seed": (("--fisher-seed", "1"), ["seed is 42, asked for 1"]),
    "compute dtype": (("--fisher-compute-dtype", "float64"), ["compute_dtype is None, asked for float64"]),
    "dtype": (("--fisher-dtype", "float32"), ["dtype is bfloat16, asked for float32"]),
    "several": (
        ("--fisher-samples", "4", "--fisher-seed", "1"),
        ["\n  - samples is 8, asked for 4", "\n  - seed is 42, asked for 1"],
    ),
}


@pytest.mark.parametrize(("options", "words"), SETTINGS.values(), ids=SETTINGS)
def test_a_fisher_of_other_settings(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, options: tuple[str, ...], words: list[str]
) -> None:
    arguments = command(models, tmp_path, "--fisher", saved_fisher, *options)
    what_to_do = "give the settings it was made with, or make another with `streammerge fisher`"
    refused(run, tmp_path, arguments, f"Fisher {saved_fisher} does not fit this merge", what_to_do, *words)


def test_a_fisher_of_another_base(
    models: Models, saved_models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    swapped = models._replace(base=models.ft, ft=models.base)
    made = f"it was made from {saved_models.base}, whose content differs from {models.ft}"
    words = ("the Fisher was made from another base model", "`streammerge fisher`", made)
    refused(run, tmp_path, command(swapped, tmp_path, "--fisher", saved_fisher), *words)
    arguments = command(swapped, tmp_path, "--save-fisher", saved_fisher)
    refused(run, tmp_path, arguments, *words)
    assert run(*command(models, tmp_path, "--fisher", saved_fisher)).code == 0


def test_a_folder_for_a_fisher_that_is_not_free(models: Models, tmp_path: Path, run: Run) -> None:
    refused(run, tmp_path, command(models, tmp_path, "--save-fisher", models.base), "is also an input")
    refused(run, tmp_path, command(models, tmp_path, "--save-fisher", models.ft), "is not empty")
    refused(run, tmp_path, command(models, tmp_path, "--save-fisher", tmp_path / "out" / "f"), "lies inside")


def test_overwrite_replaces_a_fisher_and_nothing_else(models: Models, tmp_path: Path, run: Run) -> None:
    arguments = ("fisher", "--base", models.base, "--out", tmp_path / "f", "-q", "--fisher-samples", "1")
    assert run(*arguments, "--max-shard-size", "2KB").code == 0
    refused(run, tmp_path, arguments, "is not empty", "--overwrite")
    refused(run, tmp_path, command(models, tmp_path, *TASK_ARITHMETIC, "--overwrite", "--out", tmp_path / "f"), "empty")
    assert run(*arguments, "--overwrite").code == 0
    assert sorted(content(tmp_path / "f")) == ["fisher.json", WEIGHTS]


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there(models: Models, tmp_path: Path, run: Run, device: str) -> None:
    words = f"--device {device}: there is no such device here"
    refused(run, tmp_path, command(models, tmp_path, "--device", device), words)
    refused(run, tmp_path, ("fisher", "--base", models.base, "--out", tmp_path / "f", "--device", device), words)


DEVICE_MAPS: dict[str, tuple[str | None, str]] = {
    "no file": (None, "No such file or directory: give auto, or a JSON file"),
    "no JSON": ("{", "not valid JSON"),
    "no mapping": ("[]", "must be a mapping like"),
    "no place": ('{"model": null}', "must be a mapping like"),
    "no module": ('{"model.blocks": "cpu"}', "'model.blocks' is no module of Qwen2ForCausalLM"),
    "not every block": ('{"model.layers.0": "cpu"}', "it does not place 'model.layers.1'"),
    "no device": ('{"model": "tpu"}', "'model.layers.0' is on 'tpu': a block is on cpu or disk"),
}


@pytest.mark.parametrize(("text", "words"), DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_a_device_map_that_is_none(models: Models, tmp_path: Path, run: Run, text: str | None, words: str) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    for arguments in fisher_passes(models, tmp_path, "--device", "cpu", "--device-map", path):
        assert refused(run, tmp_path, arguments, f"--device-map {path}: {words}").count("\n") == 1


def fisher_passes(models: Models, tmp_path: Path, *options: object) -> list[tuple[object, ...]]:
    """Every command that makes or plans a Fisher pass, with the options."""
    pair = ("--base", models.base, "--ft", models.ft)
    return [
        ("fisher", "--base", models.base, "--out", tmp_path / "f", "-q", *options),
        command(models, tmp_path, *options),
        command(models, tmp_path, "--save-fisher", tmp_path / "f", *options),
        ("merge", *pair, "--dry-run", *options),
        ("plan", *pair, *options),
    ]


REFUSED_AT_ONCE: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "meta": (("--device", "meta"), ["--device meta: models run on cpu or cuda"]),
    "no device": (("--device", "warp"), ["--device warp: there is no such device here"]),
    "GPU memory on the CPU": (
        ("--device", "cpu", "--max-vram", "8GB"),
        ["--max-vram is for a Fisher pass on a GPU; this one runs on the CPU: leave it out"],
    ),
    "a text that is not there": (("--fisher-probe-text", "nowhere"), ["--probe-text nowhere: No such file"]),
    "a text that is short": (("--fisher-probe-text", "{text}"), ["26 tokens, and 8 samples of 64 take 512"]),
}


@pytest.mark.parametrize(("options", "words"), REFUSED_AT_ONCE.values(), ids=REFUSED_AT_ONCE)
def test_a_fisher_pass_that_cannot_be_is_refused_before_anything_is_written(
    models: Models,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: list[str],
) -> None:
    give_tokenizer(models.base)
    (tmp_path / "text").write_text(ascii_lowercase)
    created: list[Path] = []
    monkeypatch.setattr(WorkFolder, "__init__", lambda self, folder, **options: created.append(folder))
    given = [option.format(text=tmp_path / "text") for option in options]
    for arguments in fisher_passes(models, tmp_path, *given):
        assert refused(run, tmp_path, arguments, *words).count("\n") == 1
    assert not created


def test_a_text_without_a_tokenizer(models: Models, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text").write_text("some text")
    for arguments in fisher_passes(models, tmp_path, "--fisher-probe-text", tmp_path / "text"):
        words = f"model {models.base}: it brings no tokenizer, which --probe-text needs"
        assert refused(run, tmp_path, arguments, words).count("\n") == 1
    (models.base / "tokenizer.json").write_text("{")
    for arguments in fisher_passes(models, tmp_path, "--fisher-probe-text", tmp_path / "text"):
        words = f"model {models.base}: its tokenizer, for --probe-text, cannot be loaded: "
        assert refused(run, tmp_path, arguments, words).count("\n") == 1


def test_a_fisher_of_a_text_fits_that_text_alone(models: Models, tmp_path: Path, run: Run) -> None:
    give_tokenizer(models.base)
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("the cat sat on the mat ")
    other.write_text("the mat sat on the cat ")
    size = ("--fisher-samples", "2", "--fisher-length", "8")
    made = ("fisher", "--base", models.base, "--out", tmp_path / "f", "-q", *size, "--probe-text", text)
    assert run(*made).code == 0
    reuse = command(models, tmp_path, "--fisher", tmp_path / "f", *size)
    refused(run, tmp_path, reuse, f"it was measured on the text {text}, asked for random tokens")
    of_other = (*reuse, "--fisher-probe-text", other)
    refused(run, tmp_path, of_other, f"it was measured on the text {text}, whose content is not that of {other}")
    refused(run, tmp_path, (*reuse, "--fisher-probe-text", "nowhere"), "--probe-text nowhere: No such file")
    assert run(*reuse, "--fisher-probe-text", text).code == 0
    text.rename(tmp_path / "moved")
    result = run(*reuse, "--fisher-probe-text", tmp_path / "moved", "--overwrite")
    assert result.code == 0, result.err


def test_a_fisher_of_random_tokens_is_none_of_a_text(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run
) -> None:
    give_tokenizer(models.base)
    (tmp_path / "text").write_text("the cat sat on the mat ")
    arguments = command(models, tmp_path, "--fisher", saved_fisher, "--fisher-probe-text", tmp_path / "text")
    refused(run, tmp_path, arguments, f"it was measured on random tokens, asked for the text {tmp_path / 'text'}")
