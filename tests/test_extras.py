"""Whoever is told to install something can: from the checkout, as README.md does, for the package is on no registry."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tiny_models import Run

from streammerge.extras import get_it

ROOT = Path(__file__).parents[1]
EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]}
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "streammerge").rglob("*.py")]
COMMAND = re.compile(r"pip install -c constraints\.txt ('\.\\*\[(\w+)\]'|\.(?=\s))")


def test_every_command_installs_from_the_checkout() -> None:
    told: set[str] = set()
    for path in PAGES:
        text = path.read_text("utf-8").replace("{extra}", "plot")
        found = COMMAND.findall(text)
        assert len(found) == text.count("pip install"), path
        told |= {extra for _, extra in found if extra}
    assert told == {"plot", "eval"} <= EXTRAS and (ROOT / "constraints.txt").is_file()
    assert COMMAND.search(get_it("eval"))


def test_the_help_of_eval_says_it_too(run: Run) -> None:
    told = " ".join(run("eval", "--help").out.replace("│", " ").split())
    assert f"Needs lm-evaluation-harness and math-verify: {get_it('eval')}." in told
