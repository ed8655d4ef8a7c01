"""The page: what it says is the manifest's, what it loads is nothing, and no name breaks out of it."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import Models, Run

import streammerge
from streammerge.checkpoints.output import REPORT_MARK
from streammerge.report import page
from streammerge.report.page import report_page
from streammerge.timeline import Phase

VOID = {"meta"}
PHASES = [Phase("plan", 0.25, 41 << 20), Phase("merge", 12.5, 300 << 20)]


class Page(HTMLParser):
    """A page taken apart; every element must close.

    Attributes:
        elements: names and attributes, in order.
        tables: caption -> rows of cells, the header first.
        text: all that is shown.
        pre: what stands in a `pre` element.
    """

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = self.pre = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(raw.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("th", "td"):
            self._rows[-1][-1] += data
        if "caption" in self._open:
            self._caption += data
        if "pre" in self._open:
            self.pre += data


@pytest.fixture(scope="module")
def results(saved_models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Manifests of merges of the tiny models, by method."""
    folder = tmp_path_factory.mktemp("merges")
    base, ft, ft2 = map(str, saved_models)
    given = {
        "fim_ties": {"models": [ft], "parameters": {"norm_tolerance": 0.001}},
        "fim_ta": {"models": [ft, ft2], "parameters": {"granularity": "tensor"}},
        "ties": {"models": [ft, ft2], "parameters": {"density": [0.3, 0.5]}},
        "passthrough": {"models": [ft]},
        "karcher": {"models": [ft]},
    }
    return {
        method: streammerge.merge({"base": base, "method": method, **values}, folder / method, device="cpu")
        for method, values in given.items()
    }


def test_the_numbers_are_the_manifests(results: dict[str, dict[str, Any]]) -> None:
    result = results["fim_ties"]
    shown = Page(report_page(result, PHASES))
    header, *rows = shown.tables["Decoder blocks"]
    for row, entry in zip(rows, result["blocks"], strict=True):
        cells = dict(zip(header, row, strict=True))
        assert int(cells["block"]) == entry["block"]
        for column, key in (("alpha", "alpha"), ("Fisher mean", "fisher_mean"), ("score", "score")):
            assert float(cells[column]) == pytest.approx(entry[key], rel=1e-3)
    header, *rows = shown.tables["Tensors"]
    assert [row[0] for row in rows] == [*result["tensors"]]
    for row, entry in zip(rows, result["tensors"].values(), strict=True):
        cells = dict(zip(header, row, strict=True))
        assert cells["shape"] == " x ".join(map(str, entry["shape"]))
        if "kept" in entry:
            assert float(cells["kept"].removesuffix("%")) == pytest.approx(
                100 * entry["kept"] / entry["numel"], rel=5e-3
            )
            assert float(cells["norm ratio"]) == pytest.approx(entry["norm_ratio"], abs=1e-4)
            assert cells["rescaled"] == ("yes" if entry["rescaled"] else "no")
        else:
            assert cells["kept"] == "-"
    shards = [[name, shard["sha256"]] for name, shard in result["shards"].items()]
    assert [[name, sha256] for name, _, sha256 in shown.tables["Weights"][1:]] == shards
    sources = [[source["role"], source["id"], "local folder", source["fingerprint"]] for source in result["sources"]]
    assert shown.tables["Sources"][1:] == sources
    assert shown.tables["Phases, 12.8 seconds in all"][1:] == [
        ["plan", "0.25", "41 MiB"],
        ["merge", "12.50", "300 MiB"],
    ]
    assert yaml.safe_load(shown.pre) == result["recipe"]


@pytest.mark.parametrize(
    ("method", "figures"), [("fim_ties", 5), ("fim_ta", 4), ("ties", 2), ("passthrough", 1), ("karcher", 2)]
)
def test_every_method_has_a_page(results: dict[str, dict[str, Any]], method: str, figures: int) -> None:
    """The phases always; coefficients, sizes, kept fractions and norm ratios as far as the method has them."""
    shown = Page(report_page(results[method], PHASES))
    assert [name for name, _ in shown.elements].count("svg") == figures
    blocks = "This method gives the decoder blocks no coefficients of their own." in shown.text
    assert blocks is not method.startswith("fim")
    assert f"Method {method}: " in shown.text
    if method == "fim_ta":
        ids = [source["id"] for source in results[method]["sources"][1:]]
        assert f"model 1: {ids[0]}; model 2: {ids[1]}." in shown.text
        names = {row[0] for row in shown.tables["Decoder blocks"][1:]}
        assert "model 2: 1 model.layers.1.mlp.up_proj.weight" in names


def test_everything_can_be_read_without_seeing_it(results: dict[str, dict[str, Any]]) -> None:
    result = results["fim_ties"]
    raw = report_page(result, PHASES)
    shown = Page(raw)
    drawn = [attributes for name, attributes in shown.elements if name == "svg"]
    assert all(attributes["role"] == "img" for attributes in drawn)
    low, high = (pick(row["alpha"] for row in result["blocks"]) for pick in (min, max))
    assert f"from {low:.3f} at block" in drawn[0]["aria-label"] and f"to {high:.3f} at block" in drawn[0]["aria-label"]
    assert "mlp.up_proj.weight" in drawn[2]["aria-label"]
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len({*ids}) > 0
    tables = [name for name, _ in shown.elements if name in ("table", "caption", "thead")]
    assert tables.count("table") == tables.count("caption") == tables.count("thead") == len(shown.tables)
    scopes = {attributes.get("scope") for name, attributes in shown.elements if name == "th"}
    assert scopes == {"col", "row"}
    assert raw.startswith(REPORT_MARK + b'<html lang="en">')


def test_it_reads_the_same_in_grey(results: dict[str, dict[str, Any]]) -> None:
    """There is no colour to be missed."""
    found = re.findall(r"#([0-9a-f]{6}|[0-9a-f]{3})\b", report_page(results["fim_ta"], PHASES).decode())
    assert "1b1b1b" in found
    assert all(colour[:-2] == colour[2:] if len(colour) == 6 else len({*colour}) == 1 for colour in found)


def test_the_page_loads_and_runs_nothing(results: dict[str, dict[str, Any]]) -> None:
    shown = Page(report_page(results["fim_ties"], PHASES))
    names = {name for name, _ in shown.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "foreignobject"}
    for _, attributes in shown.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "href", "srcset", "action")]
        assert (attributes.get("xlink:href") or "#").startswith("#")
        assert all("url(" not in (value or "").replace("url(#", "") for value in attributes.values())
    policies = [a["content"] for _, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


IN_FIGURES = {"g", "path", "use", "text", "tspan", "rect", "defs", "clippath"}
NOTES = {"section", "h2", "ul", "li"}
HOSTILE = "</td></style><script>alert(1)</script>\"' onload=x \u202e$\\frac{1}{0}$ & \x1b[2J\n]]>"


def test_no_name_breaks_out(results: dict[str, dict[str, Any]]) -> None:
    """Models, tensors and notes with markup in them change no element of the page, and are shown as they are."""
    result = copy.deepcopy(results["fim_ta"])
    plain = Page(report_page(result, PHASES))
    for source, model in zip(result["sources"][1:], result["recipe"]["models"], strict=False):
        source["id"] = model["model"] = model["model"] + HOSTILE
    for row in result["blocks"]:
        row["expert"] += HOSTILE
        row["tensor"] += HOSTILE
    result["tensors"] = {name + HOSTILE: entry for name, entry in result["tensors"].items()}
    result["shards"] = {name + HOSTILE: entry for name, entry in result["shards"].items()}
    result["notes"] = [HOSTILE]
    shown = Page(report_page(result, PHASES))
    outside = [[name for name, _ in taken.elements if name not in IN_FIGURES] for taken in (shown, plain)]
    outside = [[name for name in names if name not in NOTES] for names in outside]
    assert outside[0] == outside[1]
    assert "<script>alert(1)</script>" in shown.text
    assert "\x1b" not in shown.text and "\u202e" not in shown.text
    assert r"\u202e" in shown.text and r"\x1b[2J" in shown.text


def test_many_tensors_are_cut_and_it_is_said(
    results: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_TENSORS", 5)
    monkeypatch.setattr(page, "MOST_KINDS", 2)
    result = results["fim_ties"]
    shown = Page(report_page(result, PHASES))
    left = len(result["tensors"]) - 5
    rows = shown.tables[f"Tensors, the first 5; the other {left} are in streammerge.json"]
    assert len(rows) == 6
    assert shown.text.count("The first 2 kinds of tensor of 7; all are in streammerge.json.") == 2


def test_a_run_that_went_on_says_so(results: dict[str, dict[str, Any]]) -> None:
    result = results["ties"]
    told = f"it had merged 3 of the {len(result['tensors'])} tensors already"
    assert told in Page(report_page(result, PHASES, complete_before=3)).text
    assert told not in Page(report_page(result, PHASES)).text


@pytest.mark.usefixtures("reports")
def test_the_phases_of_a_merge(models: Models, tmp_path: Path, run: Run) -> None:
    result = run("--base", models.base, "--ft", models.ft, "--out", tmp_path / "out", "--device", "cpu", "-q", "--json")
    shown = Page((tmp_path / "out" / "report.html").read_bytes())
    (caption,) = [caption for caption in shown.tables if caption.startswith("Phases, ")]
    assert [row[0] for row in shown.tables[caption][1:]] == ["plan", "Fisher", "survey", "merge"]
    assert yaml.safe_load(shown.pre) == json.loads(result.out)["recipe"]
