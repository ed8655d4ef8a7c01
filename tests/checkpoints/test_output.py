"""What an output folder may hold: not what is an input, or somebody else's."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints.writing import IDENTITY, OTHER, SHARDS_OF, fill, interrupted, others, planned, run

from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.checkpoints.output import check_output
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError


def test_a_new_or_empty_folder_is_free(out: Path) -> None:
    check_output(out, [out.parent / "base"], overwrite=False)
    out.mkdir()
    check_output(out, [out.parent / "base"], overwrite=False)
    check_output(out, [], overwrite=True)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_an_output(out: Path, overwrite: bool) -> None:
    run(out)
    (out.parent / "link").symlink_to(out)
    for name in (out, out.parent / "link", out / ".." / "out"):
        with pytest.raises(OutputExistsError, match="is also an input"):
            check_output(name, [out.parent / "base", out], overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_output_folder(out: Path, overwrite: bool) -> None:
    out.write_text("x")
    with pytest.raises(OutputExistsError, match="out is a file"):
        check_output(out, [], overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_refused(out: Path, overwrite: bool) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"is not empty \('notes\.txt'\): .* or empty it"):
        check_output(out, [], overwrite)


def test_a_finished_merge_needs_overwrite(out: Path) -> None:
    run(out)
    with pytest.raises(OutputExistsError, match="or replace that merge with --overwrite"):
        check_output(out, [], overwrite=False)
    check_output(out, [], overwrite=True)


def test_an_unfinished_run_may_go_on(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    check_output(out, [], overwrite=False)
    check_output(out, [], overwrite=True)


def test_a_foreign_file_beside_ours_is_kept(out: Path) -> None:
    run(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"also holds 'notes\.txt', which is not ours to remove"):
        check_output(out, [], overwrite=True)


@pytest.mark.parametrize("files", [["../victim"], ["/victim"], ["x/../../victim"], [""], [7], 7, None])
def test_a_hostile_manifest_removes_nothing(out: Path, files: Any) -> None:
    run(out)
    victim = out.parent / "victim"
    victim.write_text("precious")
    if files == ["/victim"]:
        files = [str(victim)]
    (out / MANIFEST_FILE).write_text(json.dumps({"files": files}))
    with pytest.raises(OutputExistsError, match="is not empty"):
        check_output(out, [], overwrite=True)
    shards = planned(OTHER)
    with CheckpointWriter(out, shards, IDENTITY, fresh=True) as writer:  # as if nobody had checked
        fill(writer, OTHER)
        writer.publish(others(shards))
    assert victim.read_text() == "precious"
