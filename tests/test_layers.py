"""A module imports only from what comes before it, and importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import streammerge

PACKAGE = Path(streammerge.__file__).parent

# The reading order: each entry may import from itself and from those above.
ORDER = [
    "signals",
    "_version",
    "extras",
    "text",
    "errors",
    "names",
    "units",
    "branches",
    "schema",
    "yaml_text",
    "progress",
    "figures",
    "workers",
    "heap",
    "host",
    "jobs",
    "timeline",
    "checkpoints.json_text",
    "checkpoints.header_text",
    "checkpoints.header",
    "checkpoints.disk",
    "checkpoints.source",
    "checkpoints.files",
    "checkpoints.side_files",
    "checkpoints.weight_files",
    "checkpoints.fingerprint",
    "hub.xet",
    "hub.login",
    "hub.tries",
    "hub.remote",
    "hub.ranges",
    "hub.repository",
    "hub.downloads",
    "hub.pull",
    "hub",
    "checkpoints.buffers",
    "checkpoints.checksum",
    "checkpoints.checkpoint",
    "checkpoints.identity",
    "checkpoints.disk_space",
    "checkpoints.layout",
    "checkpoints.journal_text",
    "checkpoints.journal",
    "checkpoints.output",
    "checkpoints.shard_file",
    "checkpoints.work",
    "checkpoints.resume",
    "checkpoints.placing",
    "checkpoints.writer",
    "checkpoints.room",
    "checkpoints.locate",
    "checkpoints",
    "compatibility",
    "tokenizers",
    "fisher.coefficients",
    "fisher.store",
    "fisher.placement",
    "fisher.phases",
    "fisher.probes",
    "fisher.names",
    "fisher.feed",
    "fisher.recall",
    "fisher.linear",
    "fisher.blocks",
    "fisher.device_map",
    "fisher.squares",
    "fisher.head",
    "fisher.reduction",
    "fisher.state",
    "fisher.walk",
    "fisher.measure",
    "fisher",
    "calibration.store",
    "calibration.texts",
    "calibration.lockstep",
    "calibration.mutual_information",
    "calibration.channels",
    "calibration.inputs",
    "calibration.sensitivity",
    "calibration.measure",
    "calibration",
    "methods.api",
    "methods.indicators",
    "methods.brackets",
    "methods.selection",
    "methods.norms",
    "methods.gates",
    "methods.scaled",
    "methods.gram",
    "methods.linear",
    "methods.karcher",
    "methods.slerp",
    "methods.nuslerp",
    "methods.multislerp",
    "methods.model_stock",
    "methods.task_arithmetic",
    "methods.ties",
    "methods.draws",
    "methods.sparse",
    "methods.dare",
    "methods.della",
    "methods.breadcrumbs",
    "methods.sce",
    "methods.ram",
    "methods.arcee_fusion",
    "methods.nearswap",
    "methods.passthrough",
    "methods.acm",
    "methods.sens",
    "methods.regmean",
    "methods.fisher_average",
    "methods.aim",
    "methods.fim",
    "methods",
    "docstrings",
    "mergekit_names",
    "recipe",
    "catalogue",
    "actions",
    "budget",
    "travel",
    "plan",
    "needs",
    "hub.destination",
    "report",
    "report.markup",
    "report.panels",
    "report.page",
    "report.drawing",
    "row_reader",
    "row_writer",
    "unit_work",
    "engine",
    "hub.card",
    "hub.operations",
    "hub.refusals",
    "hub.settings",
    "hub.files",
    "hub.target",
    "hub.ledger",
    "hub.uploads",
    "hub.commit",
    "hub.publication",
    "merge",
    "verify.settings",
    "verify.manifest",
    "verify.files",
    "verify.sources",
    "verify",
    "hub.push",
    "diagnose.settings",
    "diagnose.numbers",
    "diagnose.collapse",
    "diagnose.nonlinearity",
    "diagnose.measure",
    "diagnose.plot",
    "diagnose.text",
    "diagnose",
    "mini_l2s.problems",
    "mini_l2s.grade",
    "mini_l2s.tokenizer",
    "mini_l2s.scoring",
    "mini_l2s",
    "evaluation.settings",
    "evaluation.task_files",
    "evaluation.problems",
    "evaluation.grading",
    "evaluation.harness",
    "evaluation.scores",
    "evaluation.store",
    "evaluation.text",
    "evaluation.run",
    "evaluation.compare",
    "evaluation",
    "sweep.grid",
    "sweep.evaluations",
    "sweep.text",
    "sweep.state",
    "sweep.run",
    "sweep",
    "testing.store",
    "testing.repository",
    "testing.faults",
    "testing.record",
    "testing.wire",
    "testing.xet",
    "testing.xet_store",
    "testing.state",
    "testing.files",
    "testing.listings",
    "testing.uploads",
    "testing.changes",
    "testing.discussions",
    "testing.cas",
    "testing.routes",
    "testing.handler",
    "testing.loopback_hub",
    "testing",
    "",
    "demo",
    "options",
    "commands.printing",
    "commands.push",
    "commands.sweep",
    "commands.merge",
    "commands.fisher",
    "commands.verify",
    "commands.methods",
    "commands.diagnose",
    "commands.eval",
    "commands.demo",
    "commands",
    "cli",
    "__main__",
]


# What imports transformers is loaded by these calls only when they are made.
LAZY = {("fisher", "fisher.measure"), ("calibration", "calibration.measure")}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of the package a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "streammerge":
            module = node.module.removeprefix("streammerge").lstrip(".")
            submodules = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} & set(MODULES)
            names |= submodules or {module}
        elif isinstance(node, ast.Import):
            names |= {
                a.name.removeprefix("streammerge").lstrip(".") for a in node.names if a.name.startswith("streammerge")
            }
    return names


def test_the_order_lists_every_module() -> None:
    assert set(ORDER) == set(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_upwards(module: str) -> None:
    below = [name for name in imported(MODULES[module]) if ORDER.index(name) > ORDER.index(module)]
    assert [name for name in below if (module, name) not in LAZY] == []


# What strict recipes and the command line stand on; `rich` and what it brings only draw a help page. It looks at `attr`
# where that is installed, as with the extra `eval`.
PYDANTIC = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
PACKAGE_NEEDS = {*PYDANTIC, "tqdm", "yaml", "cython_runtime", "streammerge"}
COMMAND_NEEDS = {*PACKAGE_NEEDS, "annotated_doc", "click", "shellingham", "typer"}
HELP_NEEDS = {*COMMAND_NEEDS, "attr", "markdown_it", "mdurl", "pygments", "rich"}


def installed_modules(statement: str) -> set[str]:
    """The top-level modules, beyond the standard library, that a fresh interpreter has loaded after a statement."""
    code = (
        f"import sys\nbefore = {{*sys.modules, *sys.stdlib_module_names}}\n{statement}\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name for name in result.stdout.splitlines()[-1].split() if not name.startswith("_")}


def command(*arguments: str) -> str:
    return f"from streammerge.cli import main\nassert main({[*arguments]}) == 0"


@pytest.mark.parametrize(
    ("statement", "needs"),
    [
        ("import streammerge", PACKAGE_NEEDS),
        ("import streammerge.testing", PACKAGE_NEEDS),
        ("import streammerge.mini_l2s", PACKAGE_NEEDS),
        ("import streammerge.cli", COMMAND_NEEDS),
        (command("--version"), COMMAND_NEEDS),
        (command("methods", "--markdown"), COMMAND_NEEDS),
        (command("--help"), HELP_NEEDS),
        (command("merge", "--help"), HELP_NEEDS),
        (command("eval", "--help"), HELP_NEEDS),
    ],
)
def test_starting_loads_few_packages(statement: str, needs: set[str]) -> None:
    """Not torch, transformers, huggingface_hub, numpy: any of them takes longer than all the rest."""
    loaded = installed_modules(statement)
    assert loaded - needs == set()
    assert loaded >= {"pydantic", "streammerge"}


def test_planning_local_models_loads_no_more(tmp_path: Path) -> None:
    from make_checkpoints import make_pair

    base, ft = make_pair("tiny", tmp_path, say=lambda line: None)
    assert installed_modules(command("plan", "--base", str(base), "--ft", str(ft))) - COMMAND_NEEDS == set()


def test_public_names() -> None:
    assert sorted(streammerge.__all__, key=str.swapcase) == sorted(set(streammerge.__all__), key=str.swapcase)
    assert all(hasattr(streammerge, name) for name in streammerge.__all__)
