"""The model card: metadata, licences, the recipe that makes the model again, the plot."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.pushing import Merge, folder_content, pushed, recipe
from tiny_models import MATRIX, Models, Run

import streammerge
from streammerge.checkpoints.checkpoint import PLOT_FILE, Checkpoint
from streammerge.hub.card import coefficient_plot, model_card, stated_licence
from streammerge.report import manifest
from streammerge.testing import Hub

SHARDS = {"model.safetensors": {"bytes": 1, "sha256": "0", "tensors": {}}}
LOCAL = {"role": "expert", "id": "ft", "revision": None}
APACHE = {"license": "apache-2.0"}
OWN = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


def card(models: Models, *sources: dict[str, Any], notes: Sequence[str] = (), licences: Any = ({}, {})) -> str:
    with streammerge.plan({"base": str(models.base), "models": [str(models.ft)], "method": "ties"}) as job:
        job.notes += notes
        result = manifest(job, job.method, sources, {MATRIX: {"numel": 1}}, SHARDS)
        return model_card(job, result, licences)


def metadata(text: str) -> dict[str, Any]:
    values = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def test_the_card_lists_hub_models_only(saved_models: Models) -> None:
    fisher = {"role": "fisher", "id": "org/fisher", "revision": "c0ffee"}
    hub = card(saved_models, {"role": "base", "id": "org/base", "revision": "c0ffee"}, LOCAL, fisher)
    local = card(saved_models, {"role": "base", "id": "folder", "revision": None}, LOCAL, fisher)
    assert metadata(hub) == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "streammerge"],
    }
    assert metadata(local) == {"library_name": "transformers", "tags": ["merge", "streammerge"]}
    assert "| base | `org/base` | c0ffee |" in hub
    assert "| base | `folder` (local folder) | - |" in local


def test_a_repository_is_named_once(saved_models: Models) -> None:
    twice = [
        {"role": role, "id": "org/x", "revision": revision} for role, revision in (("base", "c0"), ("expert", "c1"))
    ]
    assert metadata(card(saved_models, *twice))["base_model"] == ["org/x"]


def test_no_path_of_this_machine_is_in_the_card(saved_models: Models, tmp_path: Path) -> None:
    job = recipe(saved_models, method="fim_ties", models=[str(saved_models.ft), str(saved_models.ft2)])
    result = streammerge.merge({**job, "base": f"{saved_models.base}/"}, tmp_path / "out", device="cpu")
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(saved_models.base.parent) not in text
    assert "# Merge of `ft` and `ft2` into `base`" in text and "| base | `base` (local folder) | - |" in text
    assert "| ft2: 0 |" in text and "; replace the names of local folders by your own:" in text
    again = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (again["base"], [model["model"] for model in again["models"]]) == ("base", ["ft", "ft2"])
    assert result["recipe"]["models"][0]["model"] == str(saved_models.ft)  # the manifest keeps them


def test_names_cannot_break_out_of_the_card(saved_models: Models) -> None:
    evil = "x`|<script>\n---\nbase_model: evil\n# gotcha"
    source = {"role": "base", "id": evil, "revision": "c0ffee"}
    text = card(saved_models, source, LOCAL, notes=[f"note of {evil}"], licences=(OWN | {"license_name": evil}, APACHE))
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["base_model"] == [evil]
    assert "<script>" not in body and "\n# gotcha" not in body


def test_a_long_name_cannot_end_the_recipe(saved_models: Models, tmp_path: Path) -> None:
    evil = "word " * 30 + "``` # gotcha"
    with streammerge.plan({"base": str(saved_models.base), "models": [str(saved_models.ft)]}) as job:
        result = manifest(job, job.method, [{**LOCAL, "role": "base"}, LOCAL], {}, SHARDS)
        result["recipe"] = {**result["recipe"], "base": evil}
        text = model_card(job, result, [{}, {}])
    fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
    assert fences == ["````yaml", "````"]


def test_a_name_can_be_no_link_picture_or_hidden_character(saved_models: Models) -> None:
    evil = "a\u202e[click](http://evil) ![](x)"
    source = {"role": "base", "id": evil, "revision": "x|y`<b>"}
    text = card(saved_models, source, LOCAL, notes=[f"note of {evil}"])
    body = text.split("\n---\n", 1)[1]
    notes = body.split("## Notes")[1]
    assert "[click](" not in notes.replace("\\[", "").replace("\\]", "")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "| x|y" not in body and "| xyb |" in body


def test_a_recipe_of_characters_that_are_not_printed_is_the_same_recipe(saved_models: Models) -> None:
    for name in ("caf\u00e9 \u6f22", "a\u202eb\x1b\u2028c", "plain"):
        with streammerge.plan({"base": str(saved_models.base), "models": [str(saved_models.ft)]}) as job:
            result = manifest(job, job.method, [{**LOCAL, "role": "base"}, LOCAL], {}, SHARDS)
            result["recipe"] = {**result["recipe"], "base": name}
            text = model_card(job, result, [{}, {}])
        block = text.split("```yaml\n")[1].split("```")[0]
        assert all(line.isprintable() for line in block.split("\n"))
        assert yaml.safe_load(block)["base"] == name
        assert (name in block) == name.isprintable()


def test_a_bar_in_a_row_of_the_blocks_is_no_cell(saved_models: Models) -> None:
    with streammerge.plan({"base": str(saved_models.base), "models": [str(saved_models.ft)], "method": "ties"}) as job:
        result = manifest(job, job.method, [{**LOCAL, "role": "base"}, LOCAL], {}, SHARDS)
        result["blocks"] = [{"block": 0, "alpha": 0.5, "tensor": "a|b|c"}]
        text = model_card(job, result, [{}, {}])
    rows = text.split("## Blocks\n\n")[1].strip().splitlines()
    assert {row.count("|") for row in rows} == {3}


AGREEMENTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "they agree": ((APACHE, APACHE), APACHE, ""),
    "on one of their own": ((OWN, OWN), OWN, ""),
    "nobody states one": (({}, {}), {}, "None of the models states a licence."),
    "they differ": (
        (APACHE, OWN),
        {"license": "other", "license_name": "apache-2.0-and-llama3"},
        "- `{base}`: `apache-2.0`\n- `{ft}`: `llama3`, see `LICENSE`\n",
    ),
    "one states none": ((APACHE, {}), {"license": "unknown"}, "- `{base}`: `apache-2.0`\n- `{ft}`: states none\n"),
}


@pytest.mark.parametrize(("licences", "expected", "told"), AGREEMENTS.values(), ids=AGREEMENTS)
def test_licences(saved_models: Models, licences: Any, expected: dict[str, Any], told: str) -> None:
    folders = [{"role": "base", "id": saved_models.base}, {"role": "expert", "id": saved_models.ft}]
    sources = [{**source, "id": str(source["id"]), "revision": None} for source in folders]
    text = card(saved_models, *sources, licences=licences)
    assert {key: value for key, value in metadata(text).items() if key.startswith("license")} == expected
    assert told.format(base="base", ft="ft") in text
    assert ("depends on all of them" in text) == ("- `" in told) and ("## Licence" in text) == bool(told)


CARDS: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("---\nlicense: mit\ntags: [x]\n---\n# Model\n", {"license": "mit"}),
    "a list of one": ("---\nlicense:\n- mit\n---\n", {"license": "mit"}),
    "its own": ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n", OWN),
    "blank lines first": ("\n\n---\nlicense: mit\n---\n", {"license": "mit"}),
    "no metadata": ("# Model\nlicense: mit\n", {}),
    "a rule further down": ("text\n---\nlicense: mit\n---\n", {}),
    "never closed": ("---\nlicense: mit\n", {}),
    "no licence": ("---\ntags: [x]\nlicense_name: y\n---\n", {}),
    "not yaml": ("---\n{[license: mit\n---\n", {}),
    "not a mapping": ("---\n- license\n---\n", {}),
    "not a word": ("---\nlicense: {a: b}\n---\n", {}),
    "several lines": ('---\nlicense: "mit\\n# gotcha"\n---\n', {}),
    "too long": (f"---\nlicense: {'x' * 101}\n---\n", {}),
    "python": ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
    "deep": (f"---\nlicense: {'[' * 5000}\n---\n", {}),
    "aliases of aliases": (
        "---\na0: &a0 {k: v}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
        + "license: mit\n---\n",
        {},
    ),
    "a date": ("---\nlicense: 2024-99-99\n---\n", {}),
}


@pytest.mark.parametrize(("text", "expected"), CARDS.values(), ids=CARDS)
def test_what_a_models_card_states(models: Models, text: str, expected: dict[str, str]) -> None:
    (models.base / "README.md").write_text(text)
    with Checkpoint.open(models.base) as base:
        assert stated_licence(base) == expected
    (models.base / "README.md").unlink()
    with Checkpoint.open(models.base) as base:
        assert stated_licence(base) == {}


@pytest.mark.parametrize("mode", ["cache", "stream"])
def test_models_on_the_hub_are_named_pinned_and_licensed(
    hub: Hub, merge: Merge, models: Models, tmp_path: Path, mode: str, run: Run
) -> None:
    commits = {}
    for name, folder in (("base", models.base), ("ft", models.ft)):
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        commits[name] = hub.add(f"org/{name}", folder)
    merge(None, "org/new", base="org/base", models=["hf://org/ft"], hub_mode=mode)
    text = pushed(hub)["README.md"].decode()
    assert metadata(text) == {
        "base_model": ["org/base", "org/ft"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "streammerge"],
    }
    made = text.split("```yaml\n")[1].split("```")[0]
    again = yaml.safe_load(made)
    assert again["base"] == f"org/base@{commits['base']}"
    assert again["models"][0]["model"] == f"hf://org/ft@{commits['ft']}"
    (tmp_path / "recipe.yaml").write_text(made)
    for branch in ("org/base", "org/ft"):
        hub.move_branch(branch, {"config.json": b"{}"})
    result = run("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "again", "-q", "--hub-mode", mode)
    assert result.code == 0, result.err
    weights = {name: raw for name, raw in folder_content(tmp_path / "again").items() if ".safetensors" in name}
    assert weights == {name: raw for name, raw in pushed(hub).items() if ".safetensors" in name}


def test_the_plot_of_the_coefficients(saved_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = recipe(saved_models, method="fim_ta", models=[str(saved_models.ft), str(saved_models.ft2)])
    result = streammerge.merge(job, tmp_path / "with", device="cpu")
    picture = (tmp_path / "with" / PLOT_FILE).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (1050, 450)
    assert coefficient_plot(result) == picture
    text = (tmp_path / "with" / "README.md").read_text()
    assert f"({PLOT_FILE})\n\n| block |" in text
    assert PLOT_FILE in json.loads((tmp_path / "with" / "streammerge.json").read_text())["files"]

    monkeypatch.setattr("streammerge.figures.find_spec", lambda name: None)
    streammerge.merge(job, tmp_path / "without", device="cpu")
    assert not (tmp_path / "without" / PLOT_FILE).exists()
    assert PLOT_FILE not in (tmp_path / "without" / "README.md").read_text()


def test_names_of_all_kinds_can_be_drawn() -> None:
    names = ("plain", "_x", "$x$", "\u6f22\u5b57", "\x1b[31m", None)
    rows = [{"block": block, "alpha": 0.5, "expert": name} for name in names for block in (0, 1, 1)]
    assert coefficient_plot({"blocks": rows})


def test_no_plot_without_coefficients(local: dict[str, bytes]) -> None:
    assert PLOT_FILE not in local
    assert coefficient_plot({"blocks": [{"block": 0, "alpha": None}]}) is None
