"""Going on after an interruption, shard by shard: what is finished stays, what cannot be trusted is done again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints.folders import content
from checkpoints.writing import FILES, IDENTITY, LIMIT, OTHER, SHARDS_OF, STATE, interrupted, planned, resumed

from streammerge.checkpoints.output import WORK_DIR
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError


@pytest.mark.parametrize("done", range(3))
def test_finished_shards_stay_as_they_are(out: Path, expected: dict[str, bytes], done: int) -> None:
    names = [name for part in SHARDS_OF[:done] for name in part]
    begun = SHARDS_OF[done][-1:] if done != 1 else []
    first = interrupted(out, names + begun)
    assert set(first) == set(FILES[:done])
    inodes = [(out / WORK_DIR / file).stat().st_ino for file in FILES[:done]]
    with CheckpointWriter(out, planned(STATE), IDENTITY) as writer:
        assert writer.finished == first
        assert sorted(writer.entries) == sorted(names + begun)
    assert resumed(out) == set(FILES[:done])
    assert content(out) == expected
    assert [(out / file).stat().st_ino for file in FILES[:done]] == inodes  # the very same files


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"seed": 1}, "seed (0 -> 1)"),
        (
            {"recipe": {"method": "ties"}, "seed": 2},
            "recipe.method (linear -> ties), recipe.t ([1, 2] -> none), seed (0 -> 2)",
        ),
        ({"new": None}, "new (none -> none)"),
    ],
)
def test_another_identity_is_refused(out: Path, open_fds: set[int], change: dict[str, Any], keys: str) -> None:
    interrupted(out, SHARDS_OF[0])
    with pytest.raises(OutputExistsError) as caught:
        CheckpointWriter(out, planned(STATE), {**IDENTITY, **change})
    assert f"differs in {keys}:" in str(caught.value)
    assert str(out) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert not open_fds
    assert resumed(out) == {FILES[0]}  # and left as it was


def test_another_layout_is_another_identity(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    with pytest.raises(OutputExistsError, match="differs in layout:"):
        CheckpointWriter(out, planned(STATE, LIMIT - 300), IDENTITY)


def test_fresh_forgets_an_unfinished_run(out: Path, expected: dict[str, bytes]) -> None:
    interrupted(out, SHARDS_OF[0])
    with CheckpointWriter(out, planned(OTHER), {"seed": 9}, fresh=True) as writer:
        assert writer.finished == {}
    with CheckpointWriter(out, planned(STATE), IDENTITY, fresh=True) as writer:
        assert writer.finished == {}
    assert resumed(out) == set()
    assert content(out) == expected


def damage_cut(out: Path) -> None:
    path = out / WORK_DIR / FILES[1]
    os.truncate(path, path.stat().st_size - 1)


def damage_flip(out: Path) -> None:
    with (out / WORK_DIR / FILES[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def damage_delete(out: Path) -> None:
    (out / WORK_DIR / FILES[1]).unlink()


def damage_journal(out: Path) -> None:
    journal = out / WORK_DIR / "journal"
    os.truncate(journal, journal.stat().st_size - 1)


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_delete, damage_journal])
def test_a_shard_that_cannot_be_trusted_is_done_again(
    out: Path, expected: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    assert set(interrupted(out, SHARDS_OF[0] + SHARDS_OF[1])) == set(FILES[:2])
    damage(out)
    assert resumed(out) == {FILES[0]}
    assert content(out) == expected


def test_a_journal_torn_in_its_first_line_starts_anew(out: Path, expected: dict[str, bytes]) -> None:
    """Nothing comes before the first line, which is on disk before anything else is."""
    interrupted(out, [])
    os.truncate(out / WORK_DIR / "journal", 20)
    assert resumed(out) == set()
    assert content(out) == expected


def test_what_no_journal_speaks_of_is_not_taken(out: Path) -> None:
    interrupted(out, SHARDS_OF[0])
    os.truncate(out / WORK_DIR / "journal", 20)
    left = set(content(out)) - {f"{WORK_DIR}/journal"}
    with pytest.raises(OutputExistsError, match="damaged journal: start anew with --overwrite"):
        CheckpointWriter(out, planned(STATE), IDENTITY)
    assert left <= set(content(out))
