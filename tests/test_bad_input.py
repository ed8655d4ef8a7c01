"""Bad input, end to end: one clear message, exit 1, nothing written, inputs untouched."""

import json
import re
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from shutil import copytree, rmtree
from string import ascii_lowercase
from typing import Any

import pytest
import torch
import yaml
from tiny_models import (
    EMBEDDING,
    INDEX,
    MATRIX,
    NORM,
    SHARD,
    WEIGHTS,
    Models,
    Run,
    content,
    edit,
    edit_config,
    edit_header,
    give_tokenizer,
    put,
    put_header,
    put_index,
    spoil,
    tensors,
)

from streammerge.checkpoints.files import Files
from streammerge.checkpoints.work import WorkFolder
from streammerge.checkpoints.writer import CheckpointWriter

Spoil = Callable[[Path], object]
TASK_ARITHMETIC = ("--method", "task_arithmetic")
FIM_BY_NORM = ("--method", "fim_ta", "--importance", "norm")


def refused(run: Run, root: Path, arguments: tuple[object, ...], *words: str) -> str:
    """The message of a command that must be refused and leave everything below `root` as it is."""
    before = content(root)
    result = run(*arguments)
    assert result.code == 1, result.err
    assert result.out == ""
    first, *others = result.err.splitlines()
    assert first.startswith("streammerge: error: ")
    assert all(line.startswith("  - ") for line in others)
    assert not [word for word in words if word not in result.err], result.err
    assert content(root) == before
    return result.err


def command(models: Models, tmp_path: Path, *options: object) -> tuple[object, ...]:
    return ("--base", models.base, "--ft", models.ft, "--ft", models.ft2, "--out", tmp_path / "out", "-q", *options)


# --- files that are no checkpoint ---------------------------------------------------------------------------------


def cut(size: int) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def offsets(start: int, stop: int, name: str = MATRIX) -> Spoil:
    """Move one tensor's bytes by this much."""

    def change(entries: dict[str, Any]) -> None:
        place = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [place[0] + start, place[1] + stop]

    return lambda folder: edit_header(folder, change)


def duplicate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    text = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]].decode().rstrip()
    entry = json.dumps(json.loads(text)[MATRIX])
    put_header(folder, f'{text[:-1]},"{MATRIX}":{entry}}}'.encode())


def point_outside(folder: Path) -> None:
    """An index that names a good file, but one of the neighbour's."""
    outside = folder.parent / f"beside-{folder.name}.safetensors"
    (folder / WEIGHTS).rename(outside)
    weight_map = dict.fromkeys(json.loads(_header(outside)), f"../{outside.name}")
    weight_map.pop("__metadata__")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]


def empty(folder: Path) -> None:
    rmtree(folder)
    folder.mkdir()


IN_FILE = f"file {WEIGHTS}: "
LAST = "model.norm.weight"  # in the file
BROKEN: dict[str, tuple[Spoil, list[str]]] = {
    "cut in the data": (cut(-10), [IN_FILE, "truncated or corrupt: tensor", "download the file again"]),
    "cut in the header": (cut(100), [IN_FILE, "truncated: the header ends at byte"]),
    "cut in the length": (cut(5), [IN_FILE, "truncated: 5 bytes cannot hold a safetensors header"]),
    "no bytes at all": (cut(0), [IN_FILE, "truncated: 0 bytes"]),
    "header longer than the file": (lambda f: put_header(f, b"{}", 10**6), [IN_FILE, "ends at byte 1000008, the file"]),
    "header of exabytes": (lambda f: put_header(f, b"{}", 2**60), [IN_FILE, "not a safetensors file: it announces"]),
    "header no JSON": (lambda f: put_header(f, b"{nonsense"), [IN_FILE, "the header is not valid JSON"]),
    "overlapping offsets": (offsets(-4, -4), [IN_FILE, MATRIX, "overlaps the tensor before it"]),
    "a gap": (offsets(4, 4), [IN_FILE, MATRIX, "leaves a gap before it"]),
    "offsets beyond the file": (offsets(4, 4, LAST), [IN_FILE, LAST, "truncated or corrupt"]),
    "offsets backwards": (offsets(10**6, 0), [IN_FILE, MATRIX, "bad data_offsets"]),
    "offsets unlike the shape": (offsets(0, 4), [IN_FILE, MATRIX, "F32 [32, 16] does not fit its 2052 bytes"]),
    "unknown dtype": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F17")),
        [IN_FILE, MATRIX, "unknown dtype 'F17'"],
    ),
    "duplicate name": (duplicate, [IN_FILE, f"duplicate name '{MATRIX}'"]),
    "index names a missing file": (
        lambda f: put_index(f, **{MATRIX: "gone.safetensors"}),
        [f"file {INDEX}: names gone.safetensors, which is missing"],
    ),
    "index names a file outside": (point_outside, [f"file {INDEX}: ", "outside the folder"]),
    "index with an absolute path": (
        lambda f: put_index(f, **{MATRIX: "/dev/null.safetensors"}),
        [f"file {INDEX}: tensor '{MATRIX}' is mapped to '/dev/null.safetensors', no file of the folder: it is an"],
    ),
    "index of other tensors": (
        lambda f: put_index(f, ghost=SHARD),
        [f"file {INDEX}: maps tensor 'ghost' to {SHARD}, which does not hold it"],
    ),
    "only pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        ["only pickled weights (pytorch_model.bin)", "convert them", "save_pretrained(NEW_FOLDER)"],
    ),
    "one shard of two": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00002.safetensors"),
        [f"no {INDEX} beside model-00001-of-00002.safetensors", "is a download incomplete?"],
    ),
    "empty folder": (empty, ["no safetensors file in "]),
    "no folder": (rmtree, ["there is no such folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["file config.json: missing: is this a model folder?"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ["file config.json: not valid JSON"]),
    "quantised by its config": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        ["file config.json: quantised (gptq)", "dequantise it first"],
    ),
    "quantised part of a larger model": (
        lambda f: edit_config(f, text_config={"quantization_config": {"quant_method": "fp8"}}),
        ["file config.json: quantised (fp8)", "dequantise it first"],
    ),
    **{
        f"quantised by its {suffix}": (
            lambda f, name=f"model.layers.0.mlp.up_proj.{suffix}": put(f, name, torch.ones(2, dtype=torch.int32)),
            [IN_FILE, f"tensor 'model.layers.0.mlp.up_proj.{suffix}' (I32)", "dequantise the model first"],
        )
        for suffix in ("qweight", "weight_scale_inv", "scales", "absmax", "gate_blocks")
    },
    "quantised by F8_E8M0": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F8_E8M0", shape=[32, 64])),
        [IN_FILE, f"tensor '{MATRIX}' (F8_E8M0) is part of a quantised weight", "dequantise the model first"],
    ),
    "quantised by F4": (
        lambda f: edit_header(f, lambda entries: entries[MATRIX].update(dtype="F4", shape=[32, 128])),
        [IN_FILE, f"tensor '{MATRIX}' (F4) is part of a quantised weight", "dequantise the model first"],
    ),
}


@pytest.mark.parametrize("role", ["base", "ft2"])
@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model(models: Models, tmp_path: Path, run: Run, role: str, change: Spoil, words: list[str]) -> None:
    folder = getattr(models, role)
    change(folder)
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    message = refused(run, tmp_path, arguments, f"model {folder}", *words)
    assert message.count("\n") == 1
    assert refused(run, tmp_path, (*arguments, "--dry-run")) == message


def test_what_is_broken_above_is_whole_before(models: Models, tmp_path: Path, run: Run) -> None:
    put_index(models.ft)
    put_header(models.ft2, _header(models.ft2 / WEIGHTS))
    assert run(*command(models, tmp_path, *TASK_ARITHMETIC)).code == 0


@pytest.mark.parametrize(("name", "value"), [(MATRIX, torch.nan), (NORM, torch.inf), (EMBEDDING, -torch.inf)])
@pytest.mark.parametrize("role", Models._fields)
def test_nan_and_inf(models: Models, tmp_path: Path, run: Run, role: str, name: str, value: float) -> None:
    folder = getattr(models, role)
    spoil(folder, name, value)
    words = (f"model {folder}, {IN_FILE}tensor '{name}' holds 1 non-finite values", "--allow-nonfinite")
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert refused(run, tmp_path, arguments, *words).count("\n") == 1
    assert run(*arguments, "--allow-nonfinite").code == 0
    bad = {name: ~values.isfinite() for name, values in tensors(tmp_path / "out").items()}
    assert [(n, int(mask.sum())) for n, mask in bad.items() if mask.any()] == [(name, 1)]
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_nan_in_any_dtype(models: Models, tmp_path: Path, run: Run, dtype: torch.dtype) -> None:
    edit(models.ft, lambda state: state.update({name: value.to(dtype) for name, value in state.items()}))
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert run(*arguments).code == 0
    rmtree(tmp_path / "out")
    put(models.ft, MATRIX, torch.full((32, 16), torch.nan).to(dtype))
    refused(run, tmp_path, arguments, f"model {models.ft}", MATRIX, "non-finite")


@pytest.mark.parametrize(("name", "value"), [(MATRIX, torch.nan), (NORM, torch.inf), (EMBEDDING, torch.nan)])
def test_nan_and_inf_before_a_fisher_pass(models: Models, tmp_path: Path, run: Run, name: str, value: float) -> None:
    spoil(models.base, name, value)
    words = (
        f"model {models.base}, {IN_FILE}tensor '{name}' holds 1 non-finite values",
        "repair it: it cannot be walked",
    )
    refused(run, tmp_path, command(models, tmp_path), *words)
    refused(run, tmp_path, command(models, tmp_path, "--allow-nonfinite"), *words)
    refused(run, tmp_path, ("fisher", "--base", models.base, "--out", tmp_path / "f", "-q"), *words)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["ft", "ft2"])
def test_nan_and_inf_where_blocks_are_scored(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, role: str, value: float
) -> None:
    folder = getattr(models, role)
    spoil(folder, MATRIX, value)
    arguments = command(models, tmp_path, "--fisher", saved_fisher)
    refused(run, tmp_path, arguments, f"model {folder}, {IN_FILE}tensor '{MATRIX}' holds 1 non-finite", "--allow")
    words = f"model {folder}: its task vector in decoder block 1 is not finite"
    refused(run, tmp_path, (*arguments, "--allow-nonfinite"), words, "choose a method that needs none")


# --- models that do not belong together ---------------------------------------------------------------------------

UNLIKE: dict[str, tuple[Spoil, str]] = {
    "shape": (lambda f: put(f, MATRIX, torch.ones(32, 8)), f"tensor '{MATRIX}' is [32, 8], in the base [32, 16]"),
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(MATRIX)), f"tensor '{MATRIX}' is missing"),
    "extra tensor": (lambda f: put(f, "score.weight", torch.ones(2)), "tensor 'score.weight' has no counterpart"),
    "extra head": (lambda f: put(f, "lm_head.weight", torch.ones(2, 2)), "tensor 'lm_head.weight' has no counterpart"),
    "integers": (
        lambda f: put(f, MATRIX, torch.ones(32, 16, dtype=torch.int32)),
        f"tensor '{MATRIX}' is I32, in the base F32",
    ),
    "architecture": (lambda f: edit_config(f, model_type="llama"), "config model_type is 'llama', in the base 'qwen2'"),
    "vocabulary in the config": (lambda f: edit_config(f, vocab_size=50), "config vocab_size is 50, in the base 48"),
    "vocabulary in the tensor": (
        lambda f: put(f, EMBEDDING, torch.ones(50, 16)),
        f"tensor '{EMBEDDING}' is [50, 16], in the base [48, 16]",
    ),
    "heads": (lambda f: edit_config(f, num_attention_heads=4), "config num_attention_heads is 4, in the base 2"),
    "blocks": (lambda f: edit_config(f, num_hidden_layers=3), "config num_hidden_layers is 3, in the base 2"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), "config hidden_act is 'relu', in the base 'silu'"),
}


@pytest.mark.parametrize("role", ["ft", "ft2"])
@pytest.mark.parametrize(("change", "words"), UNLIKE.values(), ids=UNLIKE)
def test_a_model_unlike_the_base(
    models: Models, tmp_path: Path, run: Run, role: str, change: Spoil, words: str
) -> None:
    folder = getattr(models, role)
    change(folder)
    summary = f"these models cannot be merged into {models.base}: {folder}: {words}"
    for method in ("task_arithmetic", "fim_ties"):
        arguments = command(models, tmp_path, "--method", method)
        message = refused(run, tmp_path, arguments, summary)
        assert message.count("\n") == 1
    assert refused(run, tmp_path, ("plan", *arguments[:6], *arguments[9:])) == message


def test_every_mismatch_of_every_model_at_once(models: Models, tmp_path: Path, run: Run) -> None:
    together = ("shape", "extra tensor", "architecture", "vocabulary in the config", "vocabulary in the tensor")
    for folder in (models.ft, models.ft2):
        for name in together:
            UNLIKE[name][0](folder)
    UNLIKE["heads"][0](models.ft2)
    lines = [f"{folder}: {UNLIKE[name][1]}" for folder in (models.ft, models.ft2) for name in together]
    lines.append(f"{models.ft2}: {UNLIKE['heads'][1]}")
    for arguments in (command(models, tmp_path), command(models, tmp_path, "--dry-run")):
        message = refused(run, tmp_path, arguments)
        assert sorted(message.splitlines()[1:]) == sorted(
            f"  - {line}" + (" in the base" if "counterpart" in line else "") for line in lines
        )


def test_integers_that_differ_cannot_be_averaged(models: Models, tmp_path: Path, run: Run) -> None:
    for number, folder in enumerate(models):
        put(folder, "model.position_ids", torch.tensor([1, 2, number // 2]))
    words = f"{models.ft2}: tensor 'model.position_ids' (I64) holds other values"
    refused(run, tmp_path, command(models, tmp_path, *TASK_ARITHMETIC), words)


# --- output folders -----------------------------------------------------------------------------------------------

TAKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "is not empty": (lambda root: (root / "out").mkdir(), "out", "output folder {out} is not empty ('letter.txt')"),
    "is the base": (lambda root: None, "base", "output folder {out} is also an input: choose another --out"),
    "is a fine-tune": (lambda root: None, "ft2", "output folder {out} is also an input: choose another --out"),
    "is an input by another name": (
        lambda root: (root / "out").symlink_to(root / "ft", target_is_directory=True),
        "out",
        "output folder {out} is also an input: choose another --out",
    ),
    "lies in an input": (lambda root: None, "ft/deep/out", "output folder {out} lies inside {root}/ft: choose another"),
    "is a file": (lambda root: (root / "out").write_text("x"), "out", "output {out} is a file: choose another --out"),
    "lies in a file": (
        lambda root: (root / "f").write_text("x"),
        "f/out",
        "{out}/.streammerge: cannot be prepared: Not a",
    ),
    "has no possible name": (lambda root: None, "n" * 300, "cannot be an output folder: File name too long"),
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("prepare", "name", "words"), TAKEN.values(), ids=TAKEN)
def test_an_output_folder_that_is_not_free(
    models: Models,
    tmp_path: Path,
    run: Run,
    prepare: Callable[[Path], object],
    name: str,
    words: str,
    overwrite: tuple[str, ...],
) -> None:
    prepare(tmp_path)
    out = tmp_path / name
    if name == "out" and out.is_dir() and not out.is_symlink():
        (out / "letter.txt").write_text("dear reader")
    arguments = command(models, tmp_path, *TASK_ARITHMETIC, *overwrite, "--out", out)
    assert refused(run, tmp_path, arguments, words.format(out=out, root=tmp_path)).count("\n") == 1


def test_a_finished_merge_is_not_replaced_unasked(models: Models, tmp_path: Path, run: Run) -> None:
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    assert run(*arguments).code == 0
    refused(run, tmp_path, arguments, f"output folder {tmp_path / 'out'} is not empty", "--overwrite")
    (tmp_path / "out" / "mine").touch()
    refused(run, tmp_path, (*arguments, "--overwrite"), "also holds 'mine', which is not ours to remove")
    (tmp_path / "out" / "mine").unlink()
    spoil(models.ft, MATRIX, torch.nan)
    refused(run, tmp_path, (*arguments, "--overwrite"), "non-finite")


def test_nothing_is_left_of_folders_made_on_the_way(models: Models, tmp_path: Path, run: Run) -> None:
    spoil(models.ft, MATRIX, torch.nan)
    arguments = command(models, tmp_path, *TASK_ARITHMETIC, "--out", tmp_path / "a" / "b" / "c")
    refused(run, tmp_path, arguments, "non-finite")
    (tmp_path / "a").mkdir()
    refused(run, tmp_path, arguments, "non-finite")


def test_an_unfinished_run_of_another_recipe(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(models, tmp_path, *TASK_ARITHMETIC)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).code == 130
    words = [f"recipe.models[{number}].parameters.coefficient (0.7 -> 0.2)" for number in (0, 1)]
    refused(run, tmp_path, (*arguments, "--coefficient", "0.2"), f"unfinished run that differs in {', '.join(words)}: ")
    edit_config(models.ft2, max_position_embeddings=7)
    assert run(*arguments).code == 0


# --- a Fisher that does not fit -----------------------------------------------------------------------------------


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "fisher.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


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


# --- recipes and options ------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "method misspelt": (("-m", "fim-tie"), ["there is no such method: did you mean 'fim_ties'?", "'fim-tie'"]),
    "method unknown": (("-m", "xyz"), ["there is no such method: `streammerge methods` lists them", "'xyz'"]),
    "parameter of another method": (
        ("-m", "task_arithmetic", "--density", "0.2"),
        ["method task_arithmetic has no parameter 'density': known: coefficient"],
    ),
    "too many coefficients": (
        ("--coefficient", "1", "--coefficient", "2", "--coefficient", "3"),
        ["3 values of coefficient for 2 fine-tuned models: give one or 2"],
    ),
    "coefficient no number": (("--coefficient", "x"), ["model {ft}: coefficient: ", "not 'x'"]),
    "coefficient NaN": (("--coefficient", "nan"), ["coefficient: must be a finite number"]),
    "density above 1": (("--density", "1.5"), ["density: must be between 0 and 1, not '1.5'"]),
    "theta": (("--theta", "steep"), ["method fim_ties: theta", "'adaptive'", "not 'steep'"]),
    "trim": (("--trim", "most"), ["trim: must be 'fisher', 'quadratic', 'magnitude' or 'none', not 'most'"]),
    "coefficients that cancel": (
        ("-m", "linear", "--coefficient", "-0.5"),
        ["method linear: the coefficients sum to 0; change them or set normalize to false"],
    ),
    "samples": (("--fisher-samples", "0"), ["fisher.samples: must be at least 1, not '0'"]),
    "stored dtype": (("--fisher-dtype", "int8"), ["fisher.dtype: must be 'bfloat16' or 'float32', not 'int8'"]),
    **{
        f"{option} {size}": ((option, size), [f"{option}: ", f"'{size}'", words])
        for option in ("--max-ram", "--max-shard-size")
        for size, words in {"5G": "is not a size; write for example 5GB", "0": "at least one byte"}.items()
    },
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense(
    models: Models, tmp_path: Path, run: Run, options: tuple[str, ...], words: list[str]
) -> None:
    arguments = command(models, tmp_path, *options)
    message = refused(run, tmp_path, arguments, *(word.format(ft=models.ft) for word in words))
    assert message.count("\n") == 1


RECIPES: dict[str, tuple[str | bytes, list[str]]] = {
    "not YAML": ("base: [1\n", ["{recipe}: not valid YAML: line 1, column 7: a bracket is not closed"]),
    "not text": (b"base: \xff\n", ["{recipe}: not valid YAML: "]),
    "a date that is none": ("base: 2024-13-01\n", ["{recipe}: not valid YAML: "]),
    "Python in YAML": ("base: !!python/name:os.system x\n", ["{recipe}: not valid YAML: "]),
    "a key twice": (
        "base: a\nmodels: [b]\nbase: c\n",
        ["{recipe}: not valid YAML: line 3, column 1: 'base' is given twice"],
    ),
    "no mapping": ("- base\n- models\n", ["{recipe}: must be a mapping with the keys base, models, method"]),
    "nothing": ("", ["{recipe}: must be a mapping with the keys base, models, method"]),
    "key misspelt": ("base: a\nmodels: [b]\nmetod: ties\n", ["there is no 'metod': did you mean 'method'?"]),
    "key unknown": ("base: a\nmodels: [b]\nzzz: 1\n", ["there is no 'zzz': known: base, models, method"]),
    "the key of the models misspelt": (
        "base: a\nmodles: [b]\n",
        ["models is missing", "there is no 'modles': did you mean 'models'?"],
    ),
    "no base": ("models: [b]\n", ["base is missing"]),
    "a truth for a number": (
        "base: {base}\nmodels: [{ft}]\nparameters: {{density: true}}\n",
        ["method fim_ties, model {ft}: density: must be a number, not True"],
    ),
    "neither of two forms": (
        "base: {base}\nmodels: [{ft}]\nparameters: {{density: most}}\n",
        ["density: must be a number or 'auto', not 'most'"],
    ),
    "key misspelt in a model": (
        "base: a\nmodels: [{modle: b}]\n",
        ["models.0.model is missing", "there is no 'models.0.modle': did you mean 'model'?"],
    ),
    "key misspelt in the Fisher": (
        "base: a\nmodels: [b]\nfisher: {sampels: 4}\n",
        ["there is no 'fisher.sampels': did you mean 'samples'?"],
    ),
    "parameter misspelt": (
        "base: {base}\nmodels: [{ft}]\nparameters: {{thete: 1}}\n",
        ["method fim_ties has no parameter 'thete': did you mean 'theta'?"],
    ),
    "parameter misspelt beside a model": (
        "base: {base}\nmodels: [{{model: {ft}, parameters: {{densty: 1}}}}]\n",
        ["method fim_ties, model {ft}: there is no 'densty': did you mean 'density'?"],
    ),
    "parameters no mapping": ("base: a\nmodels: [b]\nparameters: [1]\n", ["parameters: must be a mapping, not [1]"]),
    "Fisher no mapping": ("base: a\nmodels: [b]\nfisher: yes\n", ["fisher: must be a mapping, not 'yes'"]),
    "models no list": ("base: a\nmodels: b\n", ["models: must be a list, not 'b'"]),
    "base no text": ("base: 7\nmodels: [b]\n", ["base: must be a text, not 7"]),
    "base empty": ("base: ''\nmodels: [b]\n", ["base: must be a text that is not empty"]),
    "model empty": ("base: a\nmodels: ['']\n", ["models.0.model: must be a text that is not empty"]),
    "all at once": ("base: 7\nmodels: [b]\nmethod: tie\nx: 1\n", ["base: ", "'ties'", "there is no 'x'"]),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_make_no_sense(
    models: Models, tmp_path: Path, run: Run, text: str | bytes, words: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    names = {"recipe": f"recipe {recipe}", "base": models.base, "ft": models.ft}
    if isinstance(text, str):
        text = (text.format(**names) if "{base}" in text else text).encode()
    recipe.write_bytes(text)
    message = refused(run, tmp_path, (recipe, "--out", tmp_path / "out"), *(word.format(**names) for word in words))
    assert message.count("\n") == 1


def test_a_recipe_that_is_not_there(tmp_path: Path, run: Run) -> None:
    gone = tmp_path / "gone.yaml"
    refused(run, tmp_path, (gone, "--out", tmp_path / "out"), f"recipe {gone}: No such file or directory")
    refused(run, tmp_path, (tmp_path, "--out", tmp_path / "out"), f"recipe {tmp_path}: Is a directory")


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "n" * 5000, "org/name with space", "hf://name"])
def test_a_model_that_can_be_neither_folder_nor_repository(tmp_path: Path, run: Run, name: str) -> None:
    arguments = ("--base", name, "--ft", name, "--out", tmp_path / "out")
    refused(run, tmp_path, arguments, f"model {name.removeprefix('hf://')}: there is no such ", "org/name")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "fim_ties"])
def test_too_little_memory_names_the_least_that_works(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, method: str
) -> None:
    wide = torch.zeros(4, 300_000)
    for folder in models:
        put(folder, "model.layers.0.wide.weight", wide)
    arguments = command(models, tmp_path, "-m", method, "--dry-run")
    message = refused(run, tmp_path, (*arguments, "--max-ram", "2MB"), "--max-ram", "model.layers.0.wide.weight")
    match = re.search(r"give at least (\d+)MiB\n", message)
    assert match, message
    least = int(match[1])
    refused(run, tmp_path, (*arguments, "--max-ram", f"{least - 1}MiB"), f"give at least {least}MiB")
    assert run(*arguments, "--max-ram", f"{least}MiB").code == 0
    if method != "fim_ties":  # the tensor is none of the model's, so it has no Fisher
        assert run(*arguments[:-1], "--max-ram", f"{least}MiB").code == 0


# --- each guard is needed -----------------------------------------------------------------------------------------


def _any_dict(where: str) -> type:
    return dict


def _map(files: Files) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads(files.text(INDEX))["weight_map"]
    return weight_map


def _pass(*args: object, **kwargs: object) -> None: ...


def _none(*args: object) -> list[str]:
    return []


def _duplicate_in_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "another",' + text.lstrip()[1:])


def _other_base(folder: Path) -> None:
    edit_record(folder.parent / "fisher", lambda record: record["base"].update(fingerprint="0" * 64))


# module and guard, what stands in for the guard, the fault, the options
Guard = tuple[str, str, Any, Spoil, tuple[str, ...]]
WITH_FISHER = ("--fisher", "{root}/fisher")
GUARDS: dict[str, Guard] = {
    # of a tensor of which the base's is taken: a merged one is looked at again
    "finite values": ("stream", "require_finite", _pass, lambda f: spoil(f, EMBEDDING, torch.nan), FIM_BY_NORM),
    "quantised": ("plan", "refuse_quantised", _pass, BROKEN["quantised by its config"][0], TASK_ARITHMETIC),
    "duplicates": ("checkpoints.json_text", "unique_keys", _any_dict, _duplicate_in_config, TASK_ARITHMETIC),
    "paths in an index": ("checkpoints.checkpoint", "_read_weight_map", _map, point_outside, TASK_ARITHMETIC),
    "index and headers": (
        "checkpoints.checkpoint",
        "_check_index",
        _pass,
        BROKEN["index of other tensors"][0],
        TASK_ARITHMETIC,
    ),
    "structure": ("compatibility", "_config_mismatches", _none, UNLIKE["architecture"][0], TASK_ARITHMETIC),
    "free output": ("merge", "check_output", _pass, lambda f: f, (*TASK_ARITHMETIC, "--out", "{root}/ft")),
    "the Fisher's base": ("merge", "check_same_base", _pass, _other_base, WITH_FISHER),
    "the Fisher's settings": ("fisher.store", "_differences", _none, lambda f: f, (*WITH_FISHER, "--fisher-seed", "1")),
    "a value per model": (
        "recipe",
        "_for_expert",
        lambda key, value, *_: value[0],
        lambda f: f,
        ("--density", "1", "--density", "0", "--density", "1"),
    ),
    "keys given twice": (
        "yaml_text",
        "_Loader",
        lambda text, most: yaml.SafeLoader(text),
        lambda f: f,
        ("{root}/recipe.yaml",),
    ),
}


@pytest.mark.parametrize(("module", "guard", "instead", "change", "options"), GUARDS.values(), ids=GUARDS)
def test_without_its_guard_bad_input_passes(
    models: Models,
    saved_fisher: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    guard: str,
    instead: Any,
    change: Spoil,
    options: tuple[str, ...],
) -> None:
    copytree(saved_fisher, tmp_path / "fisher")
    (tmp_path / "recipe.yaml").write_text("method: ties\nmethod: task_arithmetic\n")
    change(models.ft)
    arguments = command(models, tmp_path, *(option.format(root=tmp_path) for option in options))
    refused(run, tmp_path, arguments)
    monkeypatch.setattr(import_module(f"streammerge.{module}"), guard, instead)
    assert run(*arguments).code == 0
