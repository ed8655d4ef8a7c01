"""`verify` on a fresh merge, and every kind of damage to one."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import INDEX, MATRIX, NORM, Models, Run, content, edit, tensors

from streammerge import verify
from streammerge.errors import CheckpointError

MANIFEST = "streammerge.json"
Merged = Callable[..., Path]


@pytest.fixture
def out(merged: Merged) -> Path:
    """A merge in several shards."""
    return merged("out", "--max-shard-size", "8KB")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who hides it: its own SHA-256, by the last line but one, is right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest.pop("sha256", None)
    *lines, last, end = json.dumps(manifest, indent=2).split("\n")
    before, after = "\n".join([*lines, f"{last},", '  "sha256": "']), f'"\n{end}\n'
    digest = hashlib.sha256((before + after).encode()).hexdigest()
    (folder / MANIFEST).write_text(before + digest + after)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = MATRIX) -> None:
    """Write a shard anew and make manifest and index agree with it, as somebody would who hides the change."""
    path = shard_of(folder, name)
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    kept = {key: file for key, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = kept | dict.fromkeys(state, path.name)
    (folder / INDEX).write_text(json.dumps(index))
    entries = {
        file: {"bytes": len(raw := (folder / file).read_bytes()), "sha256": hashlib.sha256(raw).hexdigest()}
        for file in (path.name, INDEX)
    }

    def correct(manifest: dict[str, Any]) -> None:
        manifest["shards"][path.name], manifest["other_files"][INDEX] = entries.values()

    edit_manifest(folder, correct)


def test_a_fresh_merge_is_ok_and_stays_as_it_is(out: Path) -> None:
    before = content(out)
    state = tensors(out)
    size = sum(value.nbytes for value in state.values())
    sizes = {"tensors": len(state), "bytes": size}
    assert verify(out) == {"ok": True, "problems": [], **sizes, "nonfinite": [], "notes": []}
    assert len(list(out.glob("*.safetensors"))) > 2
    assert content(out) == before


def test_one_file_is_ok_too_and_may_move(merged: Merged, tmp_path: Path) -> None:
    assert verify(merged("single").rename(tmp_path / "moved"))["ok"]


@pytest.mark.parametrize("place", [0, 8, 60, 0.3, 0.6, -1])
@pytest.mark.parametrize("shard", [0, -1])
def test_a_flipped_bit_anywhere(out: Path, place: float, shard: int) -> None:
    path = sorted(out.glob("*.safetensors"))[shard]
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(raw)
    report = verify(out)
    assert not report["ok"]
    assert f"file {path.name} differs from the SHA-256 in the manifest" in report["problems"]


def problems_of(folder: Path) -> list[str]:
    """What `verify` finds, a manifest that is none included."""
    try:
        report = verify(folder)
    except CheckpointError as error:
        return [str(error)]
    assert report["ok"] == (not report["problems"])
    return list(report["problems"])


def test_every_one_of_a_thousand_flipped_bits(out: Path, run: Run) -> None:
    """In all files, the manifest and the model card included, each file as often as the others."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert {"config.json", "README.md", "LICENSE", INDEX, MANIFEST} < {path.name for path in files}
    draw = Random(6)
    for number in range(1000):
        path = draw.choice(files)
        sound = path.read_bytes()
        bit = draw.randrange(8 * len(sound))
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        told = problems_of(out)
        if number % 20 == 0:
            result = run("verify", out, "--json", "-q")
            assert result.code == 1
            assert (json.loads(result.out)["problems"] == told) if result.out else told[0] in result.err
        path.write_bytes(sound)
        assert any(path.name in line for line in told), f"bit {bit} of {path.name}: {told}"
    assert run("verify", out, "--json", "-q").code == 0


def test_of_a_manifest_without_its_own_checksum_the_shards_are_checked(out: Path, run: Run) -> None:
    """As manifests were before they had one; where only one of the two keys is gone, it is damage."""
    values = json.loads((out / MANIFEST).read_text())
    older = {key: value for key, value in values.items() if key not in ("sha256", "other_files")}
    (out / MANIFEST).write_text(json.dumps(older))
    (out / "LICENSE").write_text("another")
    result = run("verify", out, "-q")
    assert (result.code, "only the shards are checked" in result.out) == (0, True)
    for key in ("sha256", "other_files"):
        (out / MANIFEST).write_text(json.dumps({**older, key: values[key]}))
        assert f"file {MANIFEST} differs from its own SHA-256" in verify(out)["problems"]


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [append, cut])
def test_another_size(out: Path, damage: Callable[[Path], None]) -> None:
    path = shard_of(out, MATRIX)
    size = path.stat().st_size
    damage(path)
    problems = verify(out)["problems"]
    assert f"file {path.name} has {path.stat().st_size} bytes, the manifest says {size}" in problems


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "README.md", INDEX, "a shard"])
def test_a_missing_file(out: Path, name: str) -> None:
    path = shard_of(out, MATRIX) if name == "a shard" else out / name
    path.unlink()
    assert f"file {path.name} is missing" in verify(out)["problems"]


def test_a_folder_in_the_place_of_a_file(out: Path) -> None:
    (out / "LICENSE").unlink()
    (out / "LICENSE").mkdir()
    assert verify(out)["problems"] == ["file LICENSE is missing"]


REWRITTEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another dtype": (
        lambda state: state.update({MATRIX: state[MATRIX].bfloat16()}),
        f"tensor '{MATRIX}' is BF16 [32, 16], the manifest says F32 [32, 16]",
    ),
    "another shape": (
        lambda state: state.update({MATRIX: state[MATRIX].reshape(16, 32)}),
        f"tensor '{MATRIX}' is F32 [16, 32], the manifest says F32 [32, 16]",
    ),
    "an extra tensor": (lambda state: state.update(extra=torch.ones(1)), "tensor 'extra' is not in the manifest"),
    "a tensor less": (lambda state: state.pop(MATRIX), f"tensor '{MATRIX}' is missing"),
    "NaN": (lambda state: state[MATRIX].view(-1)[-1:].fill_(torch.nan), f"tensor '{MATRIX}' holds NaN or Inf"),
    "Inf": (lambda state: state[MATRIX].view(-1)[:1].fill_(-torch.inf), f"tensor '{MATRIX}' holds NaN or Inf"),
}


@pytest.mark.parametrize(("change", "problem"), REWRITTEN.values(), ids=REWRITTEN)
def test_a_shard_rewritten_with_its_hash(
    out: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    rewrite(out, change)
    assert verify(out)["problems"] == [problem]


def test_non_finite_values_that_were_let_through_are_told(out: Path) -> None:
    rewrite(out, REWRITTEN["NaN"][0])
    assert verify(out)["nonfinite"] == [MATRIX]
    edit_manifest(out, lambda manifest: manifest["recipe"].update(allow_nonfinite=True))
    report = verify(out)
    assert (report["ok"], report["nonfinite"]) == (True, [MATRIX])


def test_at_most_ten_tensors_with_non_finite_values_are_named(models: Models, merged: Merged, run: Run) -> None:
    def every(state: dict[str, torch.Tensor]) -> None:
        for value in state.values():
            value.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])

    edit(models.ft, every)
    out = merged("nonfinite", "--allow-nonfinite")
    names = sorted(verify(out)["nonfinite"])
    assert names == sorted(tensors(out))
    found = json.loads((out / MANIFEST).read_text())["tensors"]
    assert {found[name]["nonfinite"] for name in names} == {2}
    (line,) = [line for line in run("verify", out, "-q").out.splitlines() if line.startswith("note: ")]
    assert line.startswith(f"note: {len(names)} tensor(s) hold NaN or Inf: ")
    assert sum(f" {name}" in line for name in names) == 10
    assert line.endswith(f" and {len(names) - 10} more")


def test_every_problem_is_told(out: Path) -> None:
    (out / "LICENSE").unlink()
    rewrite(out, lambda state: state.update(extra=torch.ones(1)))
    append(out / json.loads((out / INDEX).read_text())["weight_map"][NORM])
    problems = verify(out)["problems"]
    assert problems[0] == "file LICENSE is missing"
    assert any("the manifest says" in problem for problem in problems[1:])


EDITED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a hash": (lambda m: next(iter(m["shards"].values())).update(sha256="0" * 64), "differs from the SHA-256"),
    "a size": (lambda m: next(iter(m["shards"].values())).update(bytes=7), "the manifest says 7"),
    "a dtype": (lambda m: m["tensors"][MATRIX].update(dtype="F16"), "the manifest says F16 [32, 16]"),
    "a shape": (lambda m: m["tensors"][MATRIX].update(shape=[512]), "the manifest says F32 [512]"),
    "a tensor less": (lambda m: m["tensors"].pop(MATRIX), f"tensor '{MATRIX}' is not in the manifest"),
    "a tensor more": (lambda m: m["tensors"].update(x=m["tensors"][MATRIX]), "tensor 'x' is missing"),
    "a file more": (lambda m: m["files"].append("x.txt"), "file x.txt is missing"),
    "a shard less": (lambda m: m["shards"].popitem(), "is not among the manifest's shards"),
}


@pytest.mark.parametrize(("change", "problem"), EDITED.values(), ids=EDITED)
def test_an_edited_manifest(out: Path, change: Callable[[dict[str, Any]], object], problem: str) -> None:
    edit_manifest(out, change)
    report = verify(out)
    assert not report["ok"]
    assert problem in report["problems"][0]


def key(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        for part in path[:-1]:
            manifest = manifest[part]
        manifest[path[-1]] = value

    return change


NO_MANIFEST: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"no {name}": lambda m, name=name: m.pop(name) for name in ("tensors", "shards", "files", "recipe")},
    "no tensor": key("tensors", value={}),
    "no shard": key("shards", value={}),
    "tensors are a list": key("tensors", value=[]),
    "an entry is a number": key("tensors", MATRIX, value=3),
    "a shape is a number": key("tensors", MATRIX, "shape", value=3),
    "files are text": key("files", value="LICENSE"),
    "a file is a number": key("files", value=[7]),
    "a file is elsewhere": key("files", value=["../../secret"]),
    "a shard is elsewhere": lambda m: m["shards"].update({"/dev/zero": {"bytes": 0, "sha256": ""}}),
    "a size is text": lambda m: m["shards"].popitem()[1] and m["shards"].update(x={"bytes": "7", "sha256": ""}),
    "the recipe is text": key("recipe", value="allow_nonfinite"),
    "the recipe is silent": lambda m: m["recipe"].pop("allow_nonfinite"),
}


@pytest.mark.parametrize("change", NO_MANIFEST.values(), ids=NO_MANIFEST)
def test_what_is_no_manifest_is_named(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(out, change)
    with pytest.raises(CheckpointError, match=f"{out}, file {MANIFEST}: damaged: not a manifest of streammerge"):
        verify(out)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff", b'{"tensors":' * 50_000])
def test_a_manifest_that_cannot_be_read(out: Path, text: bytes) -> None:
    (out / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match="damaged: not a manifest of streammerge"):
        verify(out)


def test_a_damaged_manifest_is_json_for_scripts_too(out: Path, run: Run) -> None:
    (out / MANIFEST).write_bytes(b"{")
    result = run("verify", out, "--json", "-q")
    assert (result.code, result.err) == (1, "")
    problem = f"{out}, file {MANIFEST}: damaged: not a manifest of streammerge"
    assert json.loads(result.out) == {"ok": False, "problems": [problem]}


@pytest.mark.parametrize("name", ["", "nowhere", "n" * 300, "LICENSE"])
def test_a_folder_that_is_no_merge(out: Path, name: str) -> None:
    (out / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="there is no streammerge.json, so this is no finished merge"):
        verify(out / name)


def test_a_shard_that_cannot_be_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real_open = shard_of(out, MATRIX), Path.open

    def fail(self: Path, mode: str = "r", **options: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(self, mode, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert verify(out)["problems"] == [f"file {path.name} cannot be read: Input/output error"]


def test_an_unfinished_merge_does_not_verify(out: Path, tmp_path: Path, run: Run) -> None:
    work = tmp_path / "work" / ".streammerge"
    work.mkdir(parents=True)
    copytree(out, work / "files")
    result = run("verify", tmp_path / "work")
    assert (result.code, result.out) == (1, "")
    assert "no finished merge" in result.err
