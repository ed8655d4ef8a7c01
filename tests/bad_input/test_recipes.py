"""Recipes and options that make no sense."""

import re
from pathlib import Path

import pytest
import torch
from bad_input.refusals import command, refused
from tiny_models import Models, Run, put

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
