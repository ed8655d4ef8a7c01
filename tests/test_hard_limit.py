"""A merge of tensors larger than its budget, in a process that the system lets grow by the promise and no more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hard_limit import LIMITS, main, merge_limited
from safetensors.torch import load_file, save_file

MIB = 1 << 20
BUDGET = 96 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and a fine-tune of one matrix of 128 MiB and a few of 8."""
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (16384, 4096)}
    shapes |= {f"model.layers.{block}.mlp.up_proj.weight": (4096, 1024) for block in range(4)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    folders = [folder / "base", folder / "ft"]
    for path in folders:
        path.mkdir()
        (path / "config.json").write_text("{}")
        save_file(base, path / "model.safetensors", {"format": "pt"})
        base = {name: (value + 0.5).roll(1, 0).contiguous() for name, value in base.items()}
    return folders


@pytest.mark.parametrize("limit", LIMITS)
def test_a_merge_stays_within_its_promise(pair: list[Path], tmp_path: Path, limit: str) -> None:
    base, ft = map(str, pair)
    out = tmp_path / "out"
    command = ["merge", "--base", base, "--ft", ft, "-m", "ties", "--max-ram", str(BUDGET), "--threads", "2", "-q"]
    found = merge_limited(limit, BUDGET + 64 * MIB, [*command, "--out", str(out)], tmp_path / "report")
    assert found is not None
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "streammerge.json"}
    assert len(load_file(out / "model.safetensors")) == 5


@pytest.mark.parametrize("limit", LIMITS)
def test_the_limit_limits(tmp_path: Path, pair: list[Path], limit: str) -> None:
    """With far less than it needs it fails, in one line, and goes on where it was."""
    base, ft = map(str, pair)
    command = ["merge", "--base", base, "--ft", ft, "-m", "ties", "--max-ram", "256MiB", "--threads", "4", "-q"]
    command += ["--out", str(tmp_path / "out")]
    code = (
        "import resource, sys, streammerge.engine, streammerge.cli\n"
        "line = next(line for line in open('/proc/self/status') if line.startswith(sys.argv[2]))\n"
        "size = (int(line.split()[1]) << 10) + (48 << 20)\n"
        "resource.setrlimit(getattr(resource, sys.argv[1]), (size, size))\n"
        "sys.exit(streammerge.cli.main(sys.argv[3:]))"
    )
    arguments = [sys.executable, "-c", code, limit, LIMITS[limit], *command]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "--max-ram" in result.stderr
    assert not (tmp_path / "out" / "streammerge.json").exists()


def test_the_benchmark_prints_a_verified_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--shape", "tiny", "--out", str(tmp_path), "--max-ram", "16MiB", "--limits", "RLIMIT_DATA"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| verified |")
    assert json.loads((tmp_path / "tiny" / "base" / "config.json").read_text())["model_type"] == "qwen2"
