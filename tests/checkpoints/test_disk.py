"""The seam to the local disk, and that there is no way around it."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import streammerge
from streammerge.checkpoints import disk

PACKAGE = Path(streammerge.__file__).parent

OF_OS = {
    *("open", "read", "pread", "readv", "preadv", "write", "pwrite", "writev", "pwritev", "fsync", "fdatasync"),
    *("ftruncate", "truncate", "posix_fallocate", "replace", "rename", "unlink", "remove", "mkdir", "makedirs"),
    *("rmdir", "removedirs", "link", "symlink", "sendfile", "copy_file_range", "posix_fadvise", "stat", "fstat"),
}
OF_PATHS = {"read_bytes", "read_text", "write_bytes", "write_text", "unlink", "mkdir", "rmdir", "rename", "touch"}
MODULES = {"shutil", "tempfile", "mmap", "safetensors.safe_open", "safetensors.torch.save_file"}

# Every other place that touches files, and why it may: none of them is written by a merge while it can be lost, or
# read for its tensors.
ELSEWHERE = {
    "calibration/store.py": "reads the calibration texts for their SHA-256",
    "checkpoints/files.py": "asks for the size of a small file",
    "checkpoints/output.py": "reads the manifest of what is to be replaced",
    "checkpoints/disk_space.py": "asks how much room files take",
    "commands/printing.py": "closes a standard output that takes nothing",
    "demo.py": "makes the folder of the demonstration",
    "diagnose/plot.py": "writes the plot of a diagnosis",
    "fisher/device_map.py": "reads the user's device map",
    "fisher/linear.py": "asks what processor this is",
    "fisher/probes.py": "reads the user's text",
    "fisher/store.py": "reads the user's text, and fisher.json",
    "host.py": "asks the system how much memory there is",
    "hub/card.py": "reads the licence in a model card",
    "hub/files.py": "reads small files to be pushed",
    "hub/pull.py": "keeps small files of the Hub in a scratch folder",
    "hub/push.py": "reads the manifest of a finished checkpoint",
    "hub/repository.py": "reads and writes the Hub's cache",
    "needs.py": "asks for the sizes of small files",
    "recipe.py": "reads the recipe",
    "signals.py": "writes its line to the terminal",
    "verify/files.py": "reads a finished checkpoint",
    "verify/manifest.py": "reads a finished checkpoint",
}


def around_the_seam(source: str) -> set[str]:
    """Calls by which a module touches files itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & MODULES | {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= {f"os.{alias.name}" for alias in node.names if node.module == "os" and alias.name in OF_OS}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("open")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found |= {f"os.{node.attr}"} if node.attr in OF_OS else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "disk":
                continue
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if node.func.attr in OF_PATHS or (node.func.attr == "open" and mode in ("rb", "wb", "r+b")):
                found.add(f".{node.func.attr}")
            if node.func.attr == "stat" and not node.args:
                found.add(".stat")
    return found


def test_no_other_module_touches_files() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    touching = {name for name, source in sources.items() if around_the_seam(source)}
    ours = {name for name in touching if not name.startswith("testing/")}  # the stand-in for the Hub
    assert ours - {"checkpoints/disk.py"} == set(ELSEWHERE)


@pytest.mark.parametrize(
    "line",
    [
        "os.pwrite(fd, data, 0)",
        "open('x')",
        "path.open('wb')",
        "path.write_bytes(b'')",
        "path.unlink()",
        "import shutil",
        "from os import fsync",
        "from safetensors.torch import save_file",
        "write = os.replace",
    ],
)
def test_the_test_above_sees(line: str) -> None:
    assert around_the_seam(line)


def test_a_folder_is_made_with_those_above_it_and_all_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    disk.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    disk.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 3
    (tmp_path / "file").touch()
    for name in ("file", "file/a", "file/a/b"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            disk.make_folder(tmp_path / name)


def test_a_tree_goes_and_what_its_links_point_to_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "link").symlink_to(tmp_path / "out")
    (tree / "a" / "gone").symlink_to(tmp_path / "nowhere")
    disk.remove_tree(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "kept").read_text() == "x"
    disk.remove_tree(tree)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    disk.replace_file(path, b"old")
    real = os.write

    def torn(fd: int, data: memoryview) -> int:
        real(fd, data[:1])
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", torn)
        with pytest.raises(OSError, match="Input/output"):
            disk.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    disk.replace_file(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"state": b"new"}


def test_a_tree_that_is_half_removed_does_not_have_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fisher without its weights would else be taken for a finished one."""
    tree = tmp_path / "fisher-0"
    real = os.unlink

    def failing(left: int) -> Callable[[Path], None]:
        calls = iter(range(left))

        def unlink(path: Path) -> None:
            if next(calls, None) is None:
                raise OSError(5, "Input/output error")
            real(path)

        return unlink

    for left in range(3, -1, -1):
        tree.mkdir(exist_ok=True)
        for name in "abcd":
            (tree / name).touch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", failing(left))
            with pytest.raises(OSError, match="Input/output"):
                disk.remove_tree(tree)
        assert not tree.exists() or len(list(tree.iterdir())) == 4  # what an earlier call left goes first
    disk.remove_tree(tree)
    tree.mkdir()
    disk.remove_tree(tree)
    assert list(tmp_path.iterdir()) == []
