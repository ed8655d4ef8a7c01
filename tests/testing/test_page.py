"""docs/loopback_hub.md speaks of what there is."""

import ast
import re
from pathlib import Path
from typing import get_args

from streammerge.testing.faults import Kind
from streammerge.testing.routes import ROUTES

PAGE = (Path(__file__).parents[2] / "docs" / "loopback_hub.md").read_text("utf-8")


def test_every_kind_of_fault_is_described() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(get_args(Kind))


def test_endpoints_are_called_what_it_says() -> None:
    named = re.search(r"Endpoints are called (.*?) and so on", PAGE, re.DOTALL)
    assert named is not None
    assert {*re.findall(r"`([\w-]+)`", named[1])} <= {route.endpoint for route in ROUTES}


def test_the_examples_are_python_and_name_what_can_be_imported() -> None:
    examples = [ast.parse(code) for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]
    assert len(examples) == 3
    for example in examples:
        imports = [node for node in example.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "example", "exec"), {})
