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
    "text",
    "errors",
    "names",
    "units",
    "branches",
    "schema",
    "yaml_text",
    "progress",
    "workers",
    "heap",
    "host",
    "checkpoints.json_text",
    "checkpoints.header_text",
    "checkpoints.header",
    "checkpoints.disk",
    "checkpoints.source",
    "checkpoints.files",
    "checkpoints.side_files",
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
    "checkpoints.writer",
    "checkpoints.room",
    "checkpoints.locate",
    "checkpoints",
    "compatibility",
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
    "methods.selection",
    "methods.norms",
    "methods.gates",
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
    "recipe",
    "catalogue",
    "budget",
    "travel",
    "plan",
    "needs",
    "hub.destination",
    "report",
    "stream",
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


@pytest.mark.parametrize(
    "statement",
    [
        "import streammerge",
        "import streammerge.cli",
        "import streammerge.testing",
        "from streammerge.cli import main; main(['--version'])",
        "from streammerge.cli import main; main(['methods', '--markdown'])",
    ],
)
def test_heavy_libraries_are_imported_when_needed(statement: str) -> None:
    heavy = ["torch", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy"]
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_planning_local_models_needs_no_torch(tmp_path: Path) -> None:
    from make_checkpoints import make_pair

    base, ft = make_pair("tiny", tmp_path, say=lambda line: None)
    code = (
        "import sys\nfrom streammerge.cli import main\n"
        f"status = main(['plan', '--base', {str(base)!r}, '--ft', {str(ft)!r}])\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub', 'httpx2')\n"
        "print(status, [name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


def test_public_names() -> None:
    assert sorted(streammerge.__all__, key=str.swapcase) == sorted(set(streammerge.__all__), key=str.swapcase)
    assert all(hasattr(streammerge, name) for name in streammerge.__all__)
