"""Models and folders from strangers: nothing of theirs runs, leads out of its folder, or drives the terminal."""

import ast
import json
import os
import pickle
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MATRIX, Models, Run, content, edit_config, edit_header, give_tokenizer

import streammerge
from streammerge.checkpoints import side_files
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, OutputExistsError
from streammerge.hub import repository
from streammerge.hub.remote import Tally

Merge = Callable[..., Path]
EVIL = "\x1b[31m\nstreammerge: error: forged\u202e"


def merging(models: Models, *more: object) -> tuple[object, ...]:
    return ("merge", "--base", models.base, "--ft", models.ft, "-m", "task_arithmetic", *more)


def refused(models: Models, tmp_path: Path, run: Run, *words: str) -> None:
    """A merge and its plan are refused, in one line with these words, and leave nothing behind."""
    for command in (merging(models, "--dry-run"), merging(models, "--out", tmp_path / "out")):
        before = content(tmp_path)
        result = run(*command)
        assert result.code == 1 and not [word for word in words if word not in result.err], result.err
        assert len(result.err.splitlines()) == 1
        assert content(tmp_path) == before


# --- nothing of theirs runs ---------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def commands(models: Models, tmp_path: Path) -> list[tuple[object, ...]]:
    """Everything that reads a model; a tokenizer too."""
    (tmp_path / "text").write_text("some text to read " * 20)
    probes = ("--probe-text", tmp_path / "text", "--samples", "1", "--length", "4", "--device", "cpu", "-q")
    diagnosed = ("diagnose", tmp_path / "out", "--against", models.base, "--device", "cpu", "-q")
    return [
        merging(models, "--dry-run"),
        merging(models, "--out", tmp_path / "out", "-q"),
        ("fisher", "--base", models.base, "--out", tmp_path / "fisher", *probes),
        ("verify", tmp_path / "out", "-q"),
        diagnosed,
    ]


def test_a_models_code_is_copied_and_never_run(models: Models, tmp_path: Path, run: Run) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\nclass C: ...\n"
    for folder in models:
        give_tokenizer(folder)
        for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "setup.py"):
            (folder / name).write_text(code)
        names = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.C"}
        edit_config(folder, auto_map=names)
        tokenizer = {"AutoTokenizer": ["tokenization_x.C", "tokenization_x.C"]}
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": tokenizer}))
    for command in commands(models, tmp_path):
        result = run(*command)
        assert result.code == 0, result.err
        assert not mark.exists(), command
        if command[0] == "merge":
            assert "copied, never run: __init__.py, configuration_x.py, modeling_x.py, setup.py, tok" in result.out
    assert (tmp_path / "out" / "modeling_x.py").read_text() == code


def test_code_runs_where_it_is_asked_for(models: Models, tmp_path: Path, run: Run) -> None:
    """Else the test above would show nothing."""
    mark = tmp_path / "mark"
    code = "from transformers import Qwen2Config\nclass C(Qwen2Config): model_type = 'x'\n"
    (models.base / "configuration_x.py").write_text(f"open({str(mark)!r}, 'w').close()\n{code}")
    edit_config(models.base, auto_map={"AutoConfig": "configuration_x.C"}, model_type="x")
    options = ("fisher", "--base", models.base, "--out", tmp_path / "fisher", "--device", "cpu", "-q")
    result = run(*options)
    assert result.code == 1 and "only runs with --trust-remote-code" in result.err
    assert not mark.exists()
    run(*options, "--trust-remote-code")
    assert mark.exists()


def test_no_pickle_is_loaded(models: Models, tmp_path: Path, run: Run) -> None:
    mark = tmp_path / "mark"
    names = ["pytorch_model.bin", "model.pt", "tokenizer.pkl", "vocab.pkl", "config.pkl", "scheduler.ckpt", "a.npy"]
    for folder in models:
        give_tokenizer(folder)
        for name in [*names, "training_args.bin", "spiece.model"]:
            (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    for command in commands(models, tmp_path):
        result = run(*command)
        assert result.code == 0, result.err
        assert not mark.exists(), command
    pickle.loads((models.base / "model.pt").read_bytes()).close()
    assert mark.exists()


LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load")}
METHODS |= {("yaml", "full_load"), ("yaml", "unsafe_load"), ("safetensors", "deserialize")}


OWN = {"jobs.py": {"pickle"}}  # what forks of this process say, in a pipe that nobody else has


def test_the_library_has_no_call_that_could_run_what_it_reads() -> None:
    package = Path(streammerge.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found = {module.split(".")[0] for module in modules} & LOADERS
                assert found <= OWN.get(str(path.relative_to(package)), set()), path
            if isinstance(node, ast.Call):
                function = node.func
                assert not (isinstance(function, ast.Name) and function.id in CALLS), (path, node.lineno)
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                    assert (function.value.id, function.attr) not in METHODS, (path, node.lineno)
                assert not [k for k in node.keywords if k.arg in ("shell", "allow_pickle")], (path, node.lineno)


# --- nothing leads out of its folder ------------------------------------------------------------------------------


def link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to("../secret")


def side_socket(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        listening.bind("socket.txt")
        os.chdir(here)


def composed(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        (folder / unicodedata.normalize(form, "caf\u00e9.txt")).write_text(form)


def cases(folder: Path) -> None:
    (folder / "Licence.txt").write_text("a")
    (folder / "licence.txt").write_text("b")


def in_the_way(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")

    return spoil


def named(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("x")


SPOILT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "link": (link_out, ["file notes.txt: a link to a file outside of the model"]),
    "absolute link": (lambda f: (f / "a.txt").symlink_to("/etc/hostname"), ["file a.txt: a link to a file outside"]),
    "names by case": (cases, ["'Licence.txt' and 'licence.txt' are one and the same"]),
    "names by Unicode form": (composed, ["'cafe\u0301.txt' and 'caf\u00e9.txt' are one and the same"]),
    "folder for our manifest": (in_the_way("streammerge.json/x"), ["'streammerge.json' and 'streammerge.json/x'"]),
    "folder for our card": (in_the_way("readme.md/x"), ["'README.md' and 'readme.md/x'"]),
    "folder for a shard": (in_the_way("model-00001-of-00002.safetensors/x"), ["safetensors is a folder"]),
    "folder for the index": (in_the_way("Model.safetensors.index.json/x"), ["index.json is a folder"]),
    "backslash": (named("a\\..\\x"), ["file a\\..\\x: ", "outside the folder"]),
    "drive": (named("C:x"), ["file C:x: ", "absolute"]),
    "line end": (named("a\nb"), ["file a\\nb: ", "cannot be printed"]),
    "no UTF-8": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/\xff")).write_text("x"), ["\\udcff: ", "printed"]),
}


@pytest.mark.parametrize(("change", "words"), SPOILT.values(), ids=SPOILT)
def test_side_files_that_are_not_copied(
    models: Models, tmp_path: Path, run: Run, change: Callable[[Path], object], words: list[str]
) -> None:
    change(models.base)
    refused(models, tmp_path, run, f"model {models.base}", *words)


def test_side_files_are_limited_in_size(
    models: Models, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        with (models.base / f"video{number}.mp4").open("wb") as file:
            file.truncate((600 - 100 * number) << 20)
    monkeypatch.setattr(side_files, "MAX_SIDE_BYTES", 2**30)  # what it is
    refused(models, tmp_path, run, "1.15 GB of files besides its weights", "629 MB of it in 'video0.mp4'", "1.07 GB")


def test_what_is_no_file_is_not_opened(models: Models, merged: Merge) -> None:
    side_socket(models.base)  # opening the pipe would wait for ever
    assert not {"pipe.txt", "socket.txt"} & set(os.listdir(merged()))


def test_what_the_output_gets_anew_is_not_copied_whatever_its_case(models: Models, merged: Merge) -> None:
    for name in ("readme.MD", "Streammerge.JSON", "MODEL.SAFETENSORS", "merge-coefficients.png"):
        (models.base / name).write_text("theirs")
    assert not [path for path in merged().iterdir() if path.read_bytes() == b"theirs"]


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(models: Models, tmp_path: Path, run: Run) -> None:
    snapshot, blobs = tmp_path / "models--org--base" / "snapshots" / "c0ffee", tmp_path / "models--org--base" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(models.base.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    result = run(*merging(models._replace(base=snapshot), "--out", tmp_path / "out", "-q"))
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence of base\n"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_linked_weights_are_read(models: Models, tmp_path: Path, run: Run) -> None:
    """Which lets nothing out: what is no safetensors file is refused, and the rest comes out as tensors."""
    (models.base / "model.safetensors").rename(tmp_path / "weights")
    (models.base / "model.safetensors").symlink_to(tmp_path / "weights")
    assert run(*merging(models, "--dry-run")).code == 0
    (models.base / "model.safetensors").unlink()
    (models.base / "model.safetensors").symlink_to("/dev/zero")
    refused(models, tmp_path, run, "file model.safetensors")


# --- nor out of the output ----------------------------------------------------------------------------------------


def test_overwriting_removes_nothing_elsewhere(merged: Merge, models: Models, tmp_path: Path, run: Run) -> None:
    out, kept = merged(), tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("x")
    again = merging(models, "--out", out, "--overwrite", "-q")
    manifest = json.loads((out / "streammerge.json").read_text())
    for names in (["../kept/precious"], [str(kept / "precious")], ["docs/precious"]):
        (out / "streammerge.json").write_text(json.dumps({**manifest, "files": [*manifest["files"], *names]}))
        if "docs" in names[0]:
            (out / "docs").symlink_to(kept)
        result = run(*again)
        assert result.code == 1 and "streammerge: error: output folder" in result.err, names
        assert (kept / "precious").exists()


@pytest.mark.parametrize("name", [".streammerge", ".streammerge/model.safetensors", "docs"])
def test_an_unfinished_folder_with_links_is_not_written(models: Models, tmp_path: Path, run: Run, name: str) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("x")
    (out / name).parent.mkdir(parents=True)
    (out / ".streammerge").mkdir(exist_ok=True) if name != ".streammerge" else None
    (out / name).symlink_to(kept / "precious" if "model" in name else kept)
    for options in ((), ("--overwrite",)):
        result = run(*merging(models, "--out", out, *options))
        assert result.code == 1 and "holds the link" in result.err, result.err
        assert (kept / "precious").read_text() == "x"


def test_what_is_pushed_is_in_the_folder(merged: Merge, tmp_path: Path) -> None:
    out = merged()
    (tmp_path / "secret").write_text((out / "LICENSE").read_text())
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="file LICENSE: a link to a file outside of the folder"):
        streammerge.push(out, "org/name")


# --- a Hub that lies ----------------------------------------------------------------------------------------------

COMMIT = "c0ffee" * 6 + "c0ff"
LISTINGS: dict[str, tuple[Any, str]] = {
    "file above": ({"sha": COMMIT, "siblings": [{"rfilename": "../../x"}]}, "'../../x', which is not fetched"),
    "file absolute": ({"sha": COMMIT, "siblings": [{"rfilename": "/etc/x"}]}, "absolute"),
    "file with an escape": ({"sha": COMMIT, "siblings": [{"rfilename": "\x1b[m"}]}, "cannot be printed"),
    "commit above": ({"sha": "../../..", "siblings": []}, "is no Hub"),
    "file a number": ({"sha": COMMIT, "siblings": [{"rfilename": 1}]}, "is no Hub"),
    "siblings a text": ({"sha": COMMIT, "siblings": "x"}, "is no Hub"),
    "no object": ([], "is no Hub"),
    "nested": ('{"a":' * 100_000, "is no Hub"),
}


@pytest.mark.parametrize(("listing", "words"), LISTINGS.values(), ids=LISTINGS)
def test_a_listing_that_would_lead_out_of_the_cache(listing: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = listing.encode() if isinstance(listing, str) else json.dumps(listing).encode()
    monkeypatch.setattr(repository.Remote, "body", lambda *args, **options: raw)
    with pytest.raises(CheckpointError, match="model org/name: ") as caught:
        repository.resolve("org/name", None, Tally())
    assert words in str(caught.value)


def test_a_listing_of_odd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 1, "b": -1, "c": "x", "d": None, "e": True}
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    listing = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    monkeypatch.setattr(repository.Remote, "body", lambda *args, **options: listing)
    found = repository.resolve("org/name", None, Tally()).sizes
    assert found == {"a": 1, "b": None, "c": None, "d": None, "e": None}


@pytest.mark.parametrize("reference", ["org/name\n", "org/name@../../x", "org/name@/x", "org/../name", "hf://a/b@\x1b"])
def test_references_that_are_none(reference: str) -> None:
    from streammerge.checkpoints.locate import open_model

    with pytest.raises(CheckpointError, match="there is no such"):
        open_model(reference)


# --- the terminal -------------------------------------------------------------------------------------------------


def is_clean(text: str) -> bool:
    lines = text.split("\n")
    return all(line.isprintable() for line in lines) and not [x for x in lines if x.startswith("streammerge: error: f")]


def test_names_do_not_drive_the_terminal(models: Models, tmp_path: Path, run: Run) -> None:
    folders = Models(*(folder.rename(tmp_path / f"{folder.name}{EVIL}") for folder in models))
    for folder in folders:
        edit_header(folder, lambda header: header.update({f"x{EVIL}": header.pop("model.norm.weight")}))
    evil = [
        run(*merging(folders, "--dry-run")),
        run(*merging(folders, "--out", tmp_path / f"out{EVIL}", "-q")),
        run("verify", tmp_path / f"out{EVIL}", "-q"),
        run("verify", tmp_path / f"nowhere{EVIL}"),
        run(*merging(folders, "--max-ram", f"1{EVIL}")),
        run("fisher", "--base", folders.base, "--out", tmp_path / "f", "--device", "cpu", "-q"),
    ]
    assert [result.code for result in evil] == [0, 0, 0, 1, 1, 1]
    assert all(is_clean(result.out + result.err) for result in evil), evil
    out = tmp_path / f"out{EVIL}"
    weights = next(path for path in out.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    edit_header(folders.ft, lambda header: header.pop(MATRIX))
    for result in (run("verify", out, "-q"), run(*merging(folders, "--dry-run"))):
        assert is_clean(result.out + result.err), result


def test_json_is_ascii_and_says_the_name_itself(models: Models, tmp_path: Path, run: Run) -> None:
    folders = models._replace(base=models.base.rename(tmp_path / f"base{EVIL}"))
    result = run(*merging(folders, "--dry-run", "--json"))
    assert result.out.isascii() and "\x1b" not in result.out
    assert json.loads(result.out)["base"] == str(folders.base)


def test_an_open_checkpoint_of_a_strange_name_reads(models: Models) -> None:
    edit_header(models.base, lambda header: header.update({"\x1b\0\n": header.pop("model.norm.weight")}))
    with Checkpoint.open(models.base) as base:
        assert "\x1b\0\n" in base.tensors


def test_an_output_in_the_way_is_named_visibly(tmp_path: Path) -> None:
    (tmp_path / f"a{EVIL}").write_text("x")
    with pytest.raises(OutputExistsError, match="forged") as caught:
        from streammerge.checkpoints.output import check_output

        check_output(tmp_path, [], overwrite=False)
    assert is_clean(str(caught.value))
