"""The page and the command that describe the methods: complete, up to date, and Markdown that says what is meant."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tiny_models import Run

from streammerge import catalogue
from streammerge.calibration.store import Measurement
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.methods.task_arithmetic import TaskArithmetic

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"

every_method = pytest.mark.parametrize("name", METHODS)


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == catalogue.markdown() + "\n", "docs/methods.md is stale: run make docs"


def test_the_readme_lists_every_method() -> None:
    section = (ROOT / "README.md").read_text("utf-8").split("\n## Methods\n")[1].split("\n## ")[0]
    listed = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert sorted(listed) == sorted(METHODS)


def sections() -> dict[str, list[Token]]:
    """The tokens of the page below each method's heading."""
    found: dict[str, list[Token]] = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(catalogue.markdown())
    for before, token in pairwise(tokens):
        if before.type == "heading_open" and before.tag == "h2":
            found[token.content] = []
        elif found:
            found[[*found][-1]].append(token)
    return found


def shown(token: Token) -> str:
    """What a reader sees of an inline token."""
    return "".join(child.content for child in token.children or ())


def test_a_section_for_every_method_in_order() -> None:
    assert list(sections()) == [*METHODS, "AIM, after any method"]


@every_method
def test_markdown_shows_the_words_of_the_docstring(name: str) -> None:
    """Nothing in a formula or a sentence is taken for markup by a Markdown parser, and nothing is lost."""
    tokens, described = sections()[name], catalogue.describe(name)
    inlines = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inlines for child in token.children or ()}
    assert kinds <= {"text", "code_inline", "link_open", "link_close", "strong_open", "strong_close"}
    pairs = [pair for token in inlines for pair in pairwise(token.children or ())]
    strong = [after.content for before, after in pairs if before.type == "strong_open"]
    assert strong == ["Convention:", *(["Raises:"] if described.documentation.raises else []), "Reference:", "Cost:"]

    passages = (*described.documentation.text, *described.documentation.convention)
    prose = [p.text.replace("`", "") for p in passages if not p.formula]
    read = [shown(token).removeprefix("Convention: ") for token in inlines]
    assert [text for text in prose if text not in read] == []
    formulas = [token.content.rstrip("\n") for token in tokens if token.type == "fence"]
    assert formulas == [p.text for p in passages if p.formula]
    assert f"Reference: {described.documentation.reference}".replace("`", "") in read
    assert [token.type for token in tokens if token.type.endswith("_block")] == []


@every_method
def test_markdown_has_every_parameter(name: str) -> None:
    cells = [shown(token) for token in sections()[name] if token.type == "inline"]
    rows = [cells[i : i + 4] for i in range(cells.index("parameter"), len(cells), 4)] if "parameter" in cells else []
    fields = {**METHODS[name].Parameters.model_fields, **METHODS[name].Expert.model_fields}
    assert [row[0] for row in rows[1 : 1 + len(fields)]] == list(fields)
    for key, default, scope, description in rows[1 : 1 + len(fields)]:
        assert default.lower() == str(fields[key].default).lower()
        assert scope == ("each model" if key in METHODS[name].Expert.model_fields else "the merge")
        assert description == (fields[key].description or "").replace("`", "")


def test_links() -> None:
    links = {
        name: [child.attrs["href"] for token in tokens for child in token.children or () if child.type == "link_open"]
        for name, tokens in sections().items()
    }
    assert links["ties"] == ["https://arxiv.org/abs/2306.01708"]
    assert links["slerp"] == ["https://doi.org/10.1145/325165.325242"]
    assert links["passthrough"] == ["https://github.com/arcee-ai/mergekit"]
    assert all(catalogue.describe(name).url in links[name] for name in METHODS)


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("A. Author, Title, arXiv 2306.01708.", "https://arxiv.org/abs/2306.01708"),
        ("arXiv hep-th/9901001", "https://arxiv.org/abs/hep-th/9901001"),
        ("Buss, doi 10.1145/502122.502124.", "https://doi.org/10.1145/502122.502124"),
        ("see https://example.org/a_b/, page 3", "https://example.org/a_b/"),
        ("mergekit's own", None),
    ],
)
def test_url_of(reference: str, url: str | None) -> None:
    assert catalogue.url_of(reference) == url


def test_what_markdown_would_take_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(TaskArithmetic):
        """A *b* _c_ <d> [e](f) g\\*h i_j 2 * 3 < 4 |k| &lt; `*l* | _m_` https://example.org/a_b.

        Convention: **bold** <b>.
        Reference: arXiv 2212.04089.
        """

        summary = "p | *q*"

    monkeypatch.setitem(METHODS, "odd", Odd)
    tokens = sections()["odd"]
    read = [shown(token) for token in tokens if token.type == "inline"]
    assert "A *b* _c_ <d> [e](f) g\\*h i_j 2 * 3 < 4 |k| &lt; *l* | _m_ https://example.org/a_b." in read
    assert "Convention: **bold** <b>." in read
    assert catalogue.markdown().count("| p \\| \\*q\\* |") == 1


# --- cost ---------------------------------------------------------------------------------------------------------

# Selection takes three passes, a Gram matrix or an output norm one, and applying one more.
READS = {"task_arithmetic": 1, "linear": 1, "dare_ties": 1, "karcher": 2, "model_stock": 2, "ties": 4, "fim_ties": 5}


@pytest.mark.parametrize("name", READS)
def test_cost(name: str) -> None:
    fim = name.startswith("fim")
    cost = catalogue.cost_of(name)
    assert cost == catalogue.Cost(READS[name], survey=fim, fisher="the base" if fim else "", calibration=())
    assert cost.before == (("Fisher pass", "survey") if fim else ())
    assert ("is read up to" in cost.sentence()) == (READS[name] > 1)
    assert ("Fisher" in cost.sentence(), "survey" in cost.sentence()) == (fim, fim)


def test_a_method_that_measures_something_on_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(TaskArithmetic):
        @property
        def calibration(self) -> tuple[Measurement, ...]:
            return ("channels", "mutual_information")

    Measured.__doc__ = TaskArithmetic.__doc__
    monkeypatch.setitem(METHODS, "measured", Measured)
    cost = catalogue.describe("measured").cost
    assert cost.before == ("calibration",)
    assert cost.sentence().endswith(" Needs a calibration text, to measure channels and mutual information.")


@pytest.mark.parametrize(
    ("name", "models"),
    [("ties", "one or more"), ("model_stock", "two or more"), ("nuslerp", "one or two"), ("slerp", "one")],
)
def test_how_many_models(name: str, models: str) -> None:
    assert catalogue.describe(name).models == models
    assert f"Fine-tuned models: {models}." in catalogue.describe(name).text()
    assert f"Fine-tuned models: {models}." in catalogue.describe(name).markdown()


# --- the command --------------------------------------------------------------------------------------------------


def test_the_list(run: Run) -> None:
    result = run("methods")
    assert (result.code, result.err) == (0, "")
    for line, (name, method) in zip(result.out.splitlines(), METHODS.items(), strict=True):
        assert line.split()[0] == name
        assert method.summary in line and line.endswith(f" {method.reference}")
    rows = json.loads(run("methods", "--json").out)
    assert rows == [{"name": n, "summary": m.summary, "reference": m.reference} for n, m in METHODS.items()]


def test_markdown_is_the_page(run: Run) -> None:
    assert run("methods", "--markdown") == (0, PAGE.read_text("utf-8"), "")


@every_method
def test_one_method(run: Run, name: str) -> None:
    result = run("methods", name.replace("_", "-"))
    assert (result.code, result.err) == (0, "")
    described, words = catalogue.describe(name), " ".join(result.out.split())
    passages = (*described.documentation.text, *described.documentation.convention)
    assert [p.text for p in passages if " ".join(p.text.split()) not in words] == []
    for parameter in described.parameters:
        assert f"\n  {parameter.name} = {parameter.shown}" in result.out and parameter.description in words
    for part in (described.documentation.reference, described.url, described.cost.sentence()):
        assert part in words
    formulas = [line for p in passages if p.formula for line in p.text.splitlines()]
    assert [
        line
        for line in result.out.splitlines()
        if len(line) > 80 and line.strip() not in (described.url, *map(str.strip, formulas))
    ] == []
    assert json.loads(run("methods", name, "--json").out)["parameters"] == [
        {"name": p.name, "default": p.default, "per_model": p.per_model, "description": p.description}
        for p in described.parameters
    ]


def test_a_misspelt_name(run: Run) -> None:
    with pytest.raises(RecipeError, match="there is no method 'tiess': did you mean 'ties'"):
        catalogue.describe("tiess")
    assert run("methods", "tiess") == (1, "", "streammerge: error: there is no method 'tiess': did you mean 'ties'?\n")


@pytest.mark.parametrize("more", ["ties", "--json"])
def test_the_page_is_of_all_methods(run: Run, more: str) -> None:
    result = run("methods", "--markdown", more)
    assert (result.code, result.out) == (2, "")
    assert "--markdown" in result.err
