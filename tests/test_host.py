"""Memory that can be had, from made-up files of the kernel and real limits; and running out of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streammerge.errors import MemoryBudgetError
from streammerge.host import available_memory, memory_errors, memory_limits, require_memory

GIB = 1 << 30


def put(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal:  {8 << 20} kB\nMemAvailable: {5 << 20} kB\nSwapTotal: {2 << 20} kB\nOdd: 1\n"}
V2 = {"proc/self/cgroup": "0::/user/job\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n"}
NONE = 0x7FFFFFFFFFFFF000

GROUPS: dict[str, tuple[dict[str, str], int | None]] = {
    "none": ({}, None),
    "v2": (V2 | {"sys/fs/cgroup/user/job/memory.max": f"{GIB}", "sys/fs/cgroup/user/job/memory.swap.max": "0"}, GIB),
    "v2 without swap accounting": (V2 | {"sys/fs/cgroup/user/job/memory.max": f"{GIB}\n"}, GIB),
    "v2 with swap": (
        V2 | {"sys/fs/cgroup/user/job/memory.max": f"{GIB}", "sys/fs/cgroup/user/job/memory.swap.max": f"{GIB}"},
        2 * GIB,
    ),
    "v2 with any swap": (
        V2 | {"sys/fs/cgroup/user/job/memory.max": f"{GIB}", "sys/fs/cgroup/user/job/memory.swap.max": "max"},
        None,
    ),
    "v2 without a limit": (V2 | {"sys/fs/cgroup/user/job/memory.max": "max\n"}, None),
    "v2 of the group above": (
        V2 | {"sys/fs/cgroup/user/job/memory.max": f"{3 * GIB}", "sys/fs/cgroup/user/memory.max": f"{2 * GIB}"},
        2 * GIB,
    ),
    "v1": (V1 | {"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
    "v1 in a container": (V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}"}, GIB),
    "v1 without a limit": (V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{NONE}"}, None),
    "v1 with swap": (
        V1
        | {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}",
            "sys/fs/cgroup/memory/memory.memsw.limit_in_bytes": f"{3 * GIB}",
        },
        3 * GIB,
    ),
}


@pytest.mark.parametrize(("files", "limit"), GROUPS.values(), ids=GROUPS)
def test_the_limit_of_a_control_group(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    found = memory_limits(put(tmp_path, **MEMINFO, **files))
    assert found["this machine has"] == 10 * GIB
    assert found.get("the control group allows") == limit
    assert available_memory(tmp_path) == 5 * GIB


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert "the control group allows" not in memory_limits(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize(("name", "option"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")])
def test_a_limit_of_the_process(name: str, option: str) -> None:
    code = (
        f"import resource\nresource.setrlimit(resource.{name}, (400 << 20, 400 << 20))\n"
        "from streammerge.host import require_memory\nrequire_memory(400 << 20, 'it', 'less')\n"
        "require_memory((400 << 20) + 1, 'it', 'take less')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(f"it takes 400 MiB of memory, {option} allows 400 MiB: take less")


def test_what_no_machine_has_is_refused() -> None:
    require_memory(1 << 20, "it", "take less")
    with pytest.raises(MemoryBudgetError, match=r"^it takes 1048576.0 GiB of memory, .*: take less$"):
        require_memory(1 << 50, "it", "take less")


def of_torch() -> object:
    return torch.empty(1 << 50, dtype=torch.uint8)


def of_python() -> object:
    return bytearray(1 << 55)


@pytest.mark.parametrize("allocate", [of_torch, of_python])
def test_running_out_is_one_line(allocate: object) -> None:
    with (
        pytest.raises(MemoryBudgetError, match="^the work ran out of memory: do less$"),
        memory_errors("the work", "do less"),
    ):
        allocate()


def test_running_out_on_a_gpu_is_too() -> None:
    with pytest.raises(MemoryBudgetError, match="ran out of memory"), memory_errors("the work", "do less"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("the work", "do less"):
        raise RuntimeError("a shape is wrong")
