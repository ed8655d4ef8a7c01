"""Who may see and change what, and in which words the real client says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from streammerge.testing import Hub, User

USERS = {
    "hf_alice": User("alice", organizations=("org",)),
    "hf_bob": User("bob"),
    "hf_reader": User("alice", organizations=("org",), can_write=False),
}


@pytest.fixture
def hub(folder: Callable[..., Path]) -> Iterator[Hub]:
    with Hub(users=USERS) as running:
        for name in ("public", "private", "gated"):
            running.add(f"org/{name}", folder(config_json=b"{}"))
        running.repositories["org/private"].private = True
        running.repositories["org/gated"].gated = True
        yield running


def client(hub: Hub, token: str | None) -> HfApi:
    return HfApi(endpoint=hub.url, token=token or False)


def test_whoami(hub: Hub) -> None:
    me = client(hub, "hf_alice").whoami()
    assert (me["name"], [organization["name"] for organization in me["orgs"]]) == ("alice", ["org"])
    for token in ("hf_nobody", "hf_"):
        with pytest.raises(HfHubHTTPError, match="Invalid user token") as refused:
            client(hub, token).whoami()
        assert refused.value.response.status_code == 401


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_bob", 404)])
def test_a_private_repository_is_as_if_it_were_not(hub: Hub, token: str | None, status: int) -> None:
    for name in ("org/private", "org/nowhere"):
        with pytest.raises(RepositoryNotFoundError) as refused:
            client(hub, token).model_info(name)
        assert refused.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            list(client(hub, token).list_repo_tree(name))
    assert client(hub, "hf_alice").model_info("org/private").private is True
    assert client(hub, token).model_info("org/public").private is False


@pytest.mark.parametrize(
    ("token", "status", "words"), [(None, 401, "Please log in"), ("hf_bob", 403, "you are not in the authorized list")]
)
def test_a_gated_repository_shows_its_files_to_few(
    hub: Hub, token: str | None, status: int, words: str, tmp_path: Path
) -> None:
    assert client(hub, token).model_info("org/gated").gated == "manual"
    assert client(hub, token).list_repo_files("org/gated") == ["config.json"]
    download = {"endpoint": hub.url, "token": token or False, "cache_dir": tmp_path}
    with pytest.raises(GatedRepoError, match=words) as refused:
        hf_hub_download("org/gated", "config.json", **download)
    assert refused.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        client(hub, token).auth_check("org/gated")
    if token:
        hub.repositories["org/gated"].granted.add("bob")
        assert Path(hf_hub_download("org/gated", "config.json", **download)).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        (None, 401, "Invalid username or password"),
        ("hf_nobody", 401, "Invalid credentials in Authorization header"),
        ("hf_bob", 403, "pass `create_pr=1` as a query parameter"),
        ("hf_reader", 403, "you must use a write token"),
    ],
)
def test_who_may_not_write(hub: Hub, token: str | None, status: int, words: str) -> None:
    with pytest.raises(HfHubHTTPError, match=words) as refused:
        client(hub, token).create_commit("org/public", [CommitOperationAdd("a.txt", b"1")], commit_message="no")
    assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as refused:
        client(hub, token).create_repo("org/new")
    assert refused.value.response.status_code == status
    assert list(hub.files("org/public")) == ["config.json"]
    assert "org/new" not in hub.repositories


def test_anyone_may_open_a_pull_request(hub: Hub) -> None:
    operations = [CommitOperationAdd("a.txt", b"1")]
    made = client(hub, "hf_bob").create_commit("org/public", operations, commit_message="yes", create_pr=True)
    assert (made.pr_num, list(hub.files("org/public"))) == (1, ["config.json"])
    assert hub.read("org/public", "a.txt", "refs/pr/1") == b"1"
    with pytest.raises(HfHubHTTPError):
        client(hub, "hf_bob").merge_pull_request("org/public", 1)
    client(hub, "hf_alice").merge_pull_request("org/public", 1)
    assert hub.read("org/public", "a.txt") == b"1"


def test_the_two_headers_of_an_error(hub: Hub) -> None:
    with httpx2.Client(trust_env=False) as plain:
        answers = {
            plain.get(f"{hub.url}{path}").headers["X-Error-Code"]: plain.get(f"{hub.url}{path}").json()["error"]
            for path in (
                "/api/models/org/nowhere",
                "/api/models/org/public/revision/v9",
                "/org/public/resolve/main/nowhere.txt",
                "/org/gated/resolve/main/config.json",
            )
        }
    assert list(answers) == ["RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"]
    assert answers["RevisionNotFound"] == "Invalid rev id: v9"
