"""Every fuzz target on a fixed budget of inputs, the same in every run, and on the corpus of what was once a fault.

A corpus file whose name begins with `ok-` is to be accepted, any other refused.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from fuzz.generate import GENERATORS, TOKENS, VALUES
from fuzz.targets import TARGETS, file_with, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())
BUDGET = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries({}, optional=dict.fromkeys(("dtype", "shape", "data_offsets", "x"), JSON))
# The outer shape of what each target reads, with anything at all inside.
SHAPES: dict[str, Any] = {
    "header": st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRY | JSON, max_size=4),
    "index": st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=6), JSON, max_size=4) | JSON}),
    "recipe": st.fixed_dictionaries(
        {"base": JSON, "models": st.lists(JSON, max_size=3) | JSON},
        optional=dict.fromkeys(("method", "parameters", "fisher", "calibration", "max_shard_bytes", "aim"), JSON),
    ),
    "journal": st.fixed_dictionaries({}, optional=dict.fromkeys(("tensors", "file", "sha256", "redo", "sums"), JSON)),
    "ledger": st.fixed_dictionaries({}, optional=dict.fromkeys(("target", "head", "file", "sha256", "lost"), JSON)),
    "manifest": st.fixed_dictionaries(dict.fromkeys(("recipe", "tensors", "shards", "files"), JSON)),
}


def as_bytes(name: str, value: Any) -> bytes:
    if name == "recipe":
        try:
            return yaml.safe_dump(value).encode()
        except (yaml.YAMLError, ValueError):
            pass
    raw = json.dumps(value).encode()
    if name in ("journal", "ledger"):
        return b'{"identity":{}}\n' + raw
    return file_with(raw) if name == "header" else raw


@pytest.mark.parametrize("name", TARGETS)
@BUDGET
@given(st.data())
def test_anything_in_the_right_place(name: str, data: st.DataObject) -> None:
    run(TARGETS[name], as_bytes(name, data.draw(SHAPES[name])))


@pytest.mark.parametrize("name", TARGETS)
@BUDGET
@given(st.lists(st.binary(max_size=20) | st.sampled_from(TOKENS), max_size=12).map(b"".join))
def test_any_bytes(name: str, content: bytes) -> None:
    run(TARGETS[name], content)
    if name == "header":
        run(TARGETS[name], file_with(content))


@pytest.mark.parametrize("name", TARGETS)
def test_nearly_right(name: str) -> None:
    """Both outcomes come about: the faults do not all end in the parser."""
    outcomes = [run(TARGETS[name], GENERATORS[name](Random(number))) for number in range(500)]
    assert sum(message is None for message in outcomes) > 10
    assert sum(message is not None for message in outcomes) > 10


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CORPUS)) for path in FILES])
def test_the_corpus(path: Path) -> None:
    message = run(TARGETS[path.parent.name], path.read_bytes())
    assert (message is None) == path.name.startswith("ok-"), message


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS) == set(GENERATORS) == set(SHAPES)
