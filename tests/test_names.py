"""Names of files against the path rules of both kinds of systems."""

import ntpath
import os
import posixpath
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.names import clash, folded, stays_inside, unsafe_name

GOOD = [
    "a",
    "config.json",
    "a/b/c.txt",
    "..a",
    "a..b/c",
    "...",
    "é",
    "\u6f22/\u5b57.txt",
    "a b",
    "x" * 255,
    "ab:c",
    "~",
]
BAD = {
    "..": "outside the folder",
    "../x": "outside the folder",
    "a/../../x": "outside the folder",
    "a/../x": "outside the folder",
    "..\\x": "outside the folder",
    "a\\..\\..\\x": "outside the folder",
    "a\\b": "backslash",
    "/x": "absolute",
    "//host/x": "absolute",
    "\\\\host\\x": "absolute",
    "C:\\x": "absolute",
    "c:x": "absolute",
    "": "no plain path",
    ".": "no plain path",
    "a//b": "no plain path",
    "a/": "no plain path",
    "./a": "no plain path",
    "a\0b": "cannot be printed",
    "a\nb": "cannot be printed",
    "\x1b[31m": "cannot be printed",
    "\u202ea": "cannot be printed",
    "\ud800": "cannot be printed",
    "x" * 256: "too long",
    "é" * 128: "too long",
    "a/" * 512 + "b": "too long",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert unsafe_name(name) is None


@pytest.mark.parametrize(("name", "reason"), BAD.items(), ids=map(repr, range(len(BAD))))
def test_bad_names(name: str, reason: str) -> None:
    assert reason in str(unsafe_name(name))


PARTS = st.lists(
    st.sampled_from(["..", ".", "", "a", "C:", "/", "\\", "b.txt", "..."]) | st.text(max_size=3), max_size=6
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(PARTS, st.sampled_from(["/", "\\", ""]))
@example(["C:", "x"], "")
def test_a_name_that_passes_stays_in_the_folder_on_both_systems(parts: list[str], separator: str) -> None:
    name = separator.join(parts)
    if unsafe_name(name) is None:
        for system, folder in ((posixpath, "/m/n"), (ntpath, "D:\\m\\n")):
            path = system.normpath(system.join(folder, name))
            assert path.startswith(folder + system.sep), name


def test_what_a_mac_takes_for_one_file() -> None:
    assert folded("License") == folded("LICENSE") == folded("license")
    composed, decomposed = "caf\u00e9.txt", unicodedata.normalize("NFD", "caf\u00e9.txt")
    assert composed != decomposed and folded(composed) == folded(decomposed) == folded(composed.upper())
    assert folded("a") != folded("b")


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["a", "b", "a/b"], ("a", "a/b")),
        (["A", "a/b"], ("A", "a/b")),
        (["x/License", "x/LICENSE"], ("x/LICENSE", "x/License")),
        (["X/a", "x/a"], ("X/a", "x/a")),
        (["caf\u00e9", "cafe\u0301"], ("cafe\u0301", "caf\u00e9")),
        (["a", "b/a", "b/c", "c"], None),
        (["a", "a"], None),
        ([], None),
    ],
)
def test_names_of_which_one_overwrites_another(names: list[str], pair: tuple[str, str] | None) -> None:
    assert clash(names) == pair


def test_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "outside"
    blobs = tmp_path / "models--a--b" / "blobs"
    for path in (folder, blobs, outside):
        path.mkdir(parents=True)
    for path in (folder / "own", blobs / "blob", outside / "secret", blobs.parent / "other"):
        path.write_text("x")
    links = {"in": "own", "blob": "../../blobs/blob", "out": "../../../outside/secret", "beside": "../../other"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "absolute").symlink_to(outside / "secret")
    (folder / "folder").symlink_to(outside)
    (folder / "twice").symlink_to("out")
    inside = [name for name in sorted(os.listdir(folder)) if stays_inside(folder, name)]
    assert inside == ["blob", "in", "own"]
    assert not stays_inside(folder, "folder/secret")
    (tmp_path / "link").symlink_to(folder)
    assert stays_inside(tmp_path / "link", "blob") and not stays_inside(tmp_path / "link", "out")
    plain = tmp_path / "models--a--b" / "plain"
    plain.mkdir()
    (plain / "blob").symlink_to(blobs / "blob")
    assert not stays_inside(plain, "blob")
