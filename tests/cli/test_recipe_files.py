"""Recipe files beside options, one value for all models or one each."""

import json
import re
from pathlib import Path

import pytest
import yaml
from methods.driver import resolve
from tiny_models import WEIGHTS, Models, Run, content, write_text

from streammerge.methods import METHODS


def test_options_go_before_the_recipe_file(models: Models, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {
        "base": "nowhere",
        "models": [{"model": str(models.ft), "parameters": {"coefficient": 0.5}}],
        "method": "fim_ties",
        "parameters": {"theta": 2, "gate_factor": 0.9},
        "fisher": {"samples": 2, "length": 16},
        "max_shard_bytes": "10KB",
    }
    recipe.write_text(yaml.safe_dump(values))
    options = ("--base", models.base, "--theta", "3", "--fisher-samples", "1", "--max-shard-size", "1GB", "-q")
    result = run(recipe, *options, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)["recipe"]
    assert (told["base"], told["models"][0]["model"]) == (str(models.base), str(models.ft))
    assert told["models"][0]["parameters"]["coefficient"] == 0.5
    assert (told["parameters"]["theta"], told["parameters"]["gate_factor"]) == (3, 0.9)
    assert (told["fisher"]["samples"], told["fisher"]["length"]) == (1, 16)
    assert told["max_shard_bytes"] == 10**9
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_one_value_for_all_models_or_one_each(models: Models, run: Run) -> None:
    pair = ("plan", "--base", models.base, "--ft", models.ft, "--ft", models.ft2, "-m", "ties", "--json")
    plans = [json.loads(run(*pair, "--density", "0.5", *more).out) for more in ((), ("--density", "0.25"))]
    assert [[model["density"] for model in plan["models"]] for plan in plans] == [[0.5, 0.5], [0.5, 0.25]]


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_in_the_card_can_be_run_again(
    models: Models, saved_fisher: Path, tmp_path: Path, run: Run, method: str
) -> None:
    experts = (models.ft, models.ft2)[: METHODS[method].most_experts]
    needs = resolve(method, len(experts)).method
    fisher = ("--fisher", saved_fisher) if needs.needs_fisher and not needs.fisher_of_experts else ()
    text = write_text(models, tmp_path) if needs.calibration else ()
    weighs = "coefficient" in METHODS[method].Expert.model_fields
    coefficients = [("--coefficient", value) for value in ("0.6", "0.3")[: len(experts)] if weighs]
    options = ("-m", method, *(word for pair in coefficients for word in pair), "--max-shard-size", "8KB", "-q")
    given = ("--base", models.base, *(word for expert in experts for word in ("--ft", expert)))
    assert run(*given, *options, *fisher, *text, "--out", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "run `streammerge merge recipe.yaml --out merged`; replace the names of local folders by your own" in card
    own = {Path(path).name: str(path) for path in (models.base, *experts, *fisher[1:], *text[1:])}
    recipe = tmp_path / "recipe.yaml"
    words = re.split(r"((?<!other:)(?<!trim:)\s)", card.split("```yaml\n")[1].split("```")[0])
    recipe.write_text("".join(own.get(word, word) for word in words))
    again = run("merge", recipe, "--out", tmp_path / "again", "-q")
    assert again.code == 0, again.err
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_the_tables_of_two_models_name_them(models: Models, saved_fisher: Path, tmp_path: Path, run: Run) -> None:
    pair = ("--base", models.base, "--ft", models.ft, "--ft", models.ft2)
    result = run(*pair, "--fisher", saved_fisher, "--out", tmp_path / "out", "-q")
    assert [line.split(": ")[0] for line in result.out.splitlines()[2:6]] == [str(models.ft)] * 2 + [
        str(models.ft2)
    ] * 2


def test_an_option_overrides_a_per_model_value_of_the_recipe(models: Models, tmp_path: Path, run: Run) -> None:
    recipe = {"base": str(models.base), "models": [{"model": str(models.ft), "parameters": {"coefficient": 1.0}}]}
    (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "method": "task_arithmetic"}))
    result = run("plan", str(tmp_path / "r.yaml"), "--coefficient", "0.25", "--json")
    assert json.loads(result.out)["models"][0]["coefficient"] == 0.25
