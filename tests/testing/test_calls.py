"""What the Hub object itself takes and refuses, without a request."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from streammerge.testing import Fault, Hub

Folder = Callable[..., Path]


def test_a_folder_may_be_a_text(hub: Hub, folder: Folder) -> None:
    hub.add("org/base", str(folder(config_json=b"{}")))
    assert hub.read("org/base", "config.json") == b"{}"


def test_what_cannot_be_added(hub: Hub, folder: Folder) -> None:
    there = folder(config_json=b"{}")
    for path in (there / "nowhere", there / "config.json"):
        with pytest.raises(NotADirectoryError, match=r"no such folder, which org/base was to hold"):
            hub.add("org/base", path)
    for name in ("base", "org/base/more", ""):
        with pytest.raises(ValueError, match="a repository is called org/name"):
            hub.add(name, there)
    with pytest.raises(ValueError, match="'bad branch' is no name for a branch"):
        hub.add("org/base", there, "bad branch")
    assert hub.repositories == {}


def test_what_is_not_there(hub: Hub, folder: Folder) -> None:
    with pytest.raises(LookupError, match="no repository 'org/base'; it has: none"):
        hub.files("org/base")
    hub.add("org/base", folder(config_json=b"{}"))
    for call in (
        lambda: hub.files("org/bse"),
        lambda: hub.read("org/bse", "config.json"),
        lambda: hub.move_branch("org/bse", {}),
        lambda: hub.lose_object("org/bse", 64 * "0"),
    ):
        with pytest.raises(LookupError, match="no repository 'org/bse'; it has: org/base"):
            call()
    with pytest.raises(LookupError, match="org/base has no revision 'next'; it has: main"):
        hub.files("org/base", "next")
    with pytest.raises(LookupError, match=r"org/base@main has no file 'x'; it has: config.json"):
        hub.read("org/base", "x")


def test_files_are_bytes(hub: Hub, folder: Folder) -> None:
    hub.add("org/base", folder(config_json=b"{}"))
    with pytest.raises(TypeError, match=r"the content of 'x.txt' must be bytes, not str"):
        hub.move_branch("org/base", {"x.txt": "text"})
    with pytest.raises(TypeError, match=r"the content of 'x.txt' must be bytes, not str"):
        Fault("moved_branch", files={"x.txt": "text"})


def test_the_record_can_be_cleared(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")
    hub.record.clear()
    api.model_info("me/x")
    assert {e.endpoint for e in hub.record} == {"info"} and hub.traffic()["info"].requests == 1


def test_a_branch_that_git_would_not_take(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")
    for name in ("bad branch", "v1..x", "x.lock"):
        with pytest.raises(HfHubHTTPError, match="Invalid reference name"):
            api.create_branch("me/x", branch=name)
    assert [*hub.repositories["me/x"].branches] == ["main"]
