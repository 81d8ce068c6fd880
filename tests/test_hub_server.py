"""The Hub for tests against the real client: what the other tests of the Hub stand on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

# The client uploads with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of the user "org"."""
    return HfApi(endpoint=hub.url, token="hf_org")


def download(repo: str, name: str, **options: Any) -> bytes:
    return Path(hf_hub_download(repo, name, **options)).read_bytes()


def test_creating_twice_is_a_conflict_unless_that_is_fine(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "org"
    assert api.create_repo("org/a").repo_id == "org/a"
    assert api.create_repo("org/a", exist_ok=True).repo_id == "org/a"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/a")
    assert api.repo_exists("org/a")
    api.delete_repo("org/a")
    assert not api.repo_exists("org/a")


def test_small_and_large_files_come_back(hub: HubServer, api: HfApi) -> None:
    api.create_repo("org/a")
    large = os.urandom(200_000)
    operations = [
        CommitOperationAdd("config.json", b"{}"),
        CommitOperationAdd("sub/a.sdelta", large),
        CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n"),
    ]
    info = api.create_commit("org/a", operations, commit_message="All at once")
    assert info.oid == hub.repos["model", "org/a"].refs["main"]
    assert download("org/a", "config.json") == b"{}"
    assert download("org/a", "sub/a.sdelta") == large
    assert api.list_repo_files("org/a") == ["README.md", "config.json", "sub/a.sdelta"]
    tree = {each.path: each for each in api.list_repo_tree("org/a")}
    assert set(tree) == {"README.md", "config.json", "sub"}
    (found,) = api.get_paths_info("org/a", "sub/a.sdelta")
    assert isinstance(found, RepoFile)
    assert found.lfs is not None
    assert found.lfs.sha256 == hashlib.sha256(large).hexdigest()
    sent = len(hub.calls("PUT"))
    again = api.upload_file(path_or_fileobj=large, path_in_repo="sub/a.sdelta", repo_id="org/a")
    assert (again.oid, len(hub.calls("PUT"))) == (info.oid, sent)


def test_a_large_object_goes_up_in_parts(hub: HubServer, api: HfApi) -> None:
    hub.chunk = 50_000
    api.create_repo("org/a")
    large = os.urandom(180_000)
    api.upload_file(path_or_fileobj=large, path_in_repo="a.sdelta", repo_id="org/a")
    assert len(hub.calls("PUT /part/")) == 4
    assert hub.repos["model", "org/a"].files("main")["a.sdelta"].data == large
    assert download("org/a", "a.sdelta") == large


def test_trees_come_in_pages(hub: HubServer, api: HfApi) -> None:
    names = [f"{n:02d}.json" for n in range(7)]
    hub.add("org/a", dict.fromkeys(names, b"{}"))
    hub.page = 3
    assert api.list_repo_files("org/a") == names
    found = [each.path for each in api.list_repo_tree("org/a", recursive=True)]
    assert found == names
    assert len(hub.calls("GET /api/models/org/a/tree")) >= 3


def test_a_stale_parent_is_refused_and_nothing_is_committed(hub: HubServer, api: HfApi) -> None:
    repo = hub.add("org/a", {"a.json": b"1"})
    old = repo.refs["main"]
    new = hub.add("org/a", {"a.json": b"2"}).refs["main"]
    operations = [CommitOperationAdd("a.json", b"3")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/a", operations, commit_message="Late", parent_commit=old)
    assert repo.refs["main"] == new
    api.create_commit("org/a", operations, commit_message="In time", parent_commit=new)
    assert repo.files("main")["a.json"].data == b"3"


def test_an_upload_that_fails_commits_nothing(hub: HubServer, api: HfApi) -> None:
    repo = hub.add("org/a", {"a.json": b"1"})
    before = repo.refs["main"]
    hub.fail("PUT /object/", 400)
    with pytest.raises((RuntimeError, HfHubHTTPError)):
        api.upload_file(path_or_fileobj=b"x" * 600, path_in_repo="a.sdelta", repo_id="org/a")
    assert repo.refs["main"] == before


def test_folders_are_deleted(hub: HubServer, api: HfApi) -> None:
    repo = hub.add("org/a", {"old/1.json": b"1", "old/2.json": b"2", "new.json": b"3"})
    api.delete_folder("old", "org/a")
    assert list(repo.files("main")) == ["new.json"]


def test_revisions_are_branches_tags_and_commits(hub: HubServer, api: HfApi) -> None:
    repo = hub.add("org/a", {"a.json": b"1"})
    first = repo.refs["main"]
    repo.tag("v1")
    hub.add("org/a", {"a.json": b"2"})
    hub.add("org/a", {"a.json": b"3"}, revision="refs/pr/1")
    for revision, content in {"main": b"2", "v1": b"1", first: b"1", "refs/pr/1": b"3"}.items():
        assert download("org/a", "a.json", revision=revision) == content
    refs = api.list_repo_refs("org/a")
    assert [each.name for each in refs.branches] == ["main"]
    assert [each.target_commit for each in refs.tags] == [first]


def test_what_is_missing_is_told_apart(hub: HubServer) -> None:
    hub.add("org/a", {"a.json": b"1"})
    with pytest.raises(RepositoryNotFoundError):
        download("org/b", "a.json")
    with pytest.raises(RevisionNotFoundError):
        download("org/a", "a.json", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        download("org/a", "b.json")


def test_private_and_gated_repositories_ask_who_it_is(hub: HubServer) -> None:
    hub.add("org/a", {"a.json": b"1"}).private = True
    hub.add("org/g", {"a.json": b"1"}).gated = True
    hub.tokens["hf_guest"] = "guest"
    with pytest.raises(RepositoryNotFoundError, match="401"):
        download("org/a", "a.json")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        download("org/a", "a.json", token="hf_guest")
    with pytest.raises(GatedRepoError, match="403"):
        download("org/g", "a.json", token="hf_guest")
    assert download("org/a", "a.json", token="hf_org") == b"1"
    hub.granted.add("guest")
    assert download("org/g", "a.json", token="hf_guest") == b"1"


def test_a_token_that_leaks_to_the_second_origin_is_noticed(hub: HubServer) -> None:
    """The client drops it, so a private large file comes; by hand it is refused."""
    from huggingface_hub import get_session

    repo = hub.add("org/a", {"a.sdelta": b"x" * 600})
    repo.private = True
    assert download("org/a", "a.sdelta", token="hf_org") == b"x" * 600
    place = f"{hub.cdn}/object/{repo.files('main')['a.sdelta'].sha256}"
    leak = get_session().get(place, headers={"Authorization": "Bearer hf_org"})
    assert leak.status_code == 400


def test_a_dropped_connection_is_gone_on_with(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks for the rest, from the last whole chunk that it has."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    data = os.urandom(100_000)
    hub.add("org/a", {"a.sdelta": data})
    hub.drop("GET /object/", after=55_000)
    assert download("org/a", "a.sdelta") == data
    ranges = [each.range for each in hub.seen if each.call.startswith("GET /object/")]
    assert ranges == [None, "bytes=50000-"]


def test_a_short_body_is_noticed_by_the_client_and_a_wrong_byte_is_not(hub: HubServer) -> None:
    """Why deltakit checks digests itself."""
    data = os.urandom(1000)
    hub.add("org/a", {"a.sdelta": data})
    hub.shorten("GET /object/")
    with pytest.raises(OSError, match="Consistency check failed"):
        download("org/a", "a.sdelta")
    hub.corrupt("GET /object/")
    found = download("org/a", "a.sdelta")
    assert len(found) == len(data)
    assert found != data


def test_a_snapshot_is_one_request_when_it_is_cached(hub: HubServer) -> None:
    hub.add("org/a", {"a.json": b"1", "b.bin": b"2"})
    folder = Path(snapshot_download("org/a", allow_patterns=["*.json"]))
    assert sorted(p.name for p in folder.iterdir()) == ["a.json"]
    before = len(hub.seen)
    snapshot_download("org/a", allow_patterns=["*.json"])
    assert len(hub.seen) == before + 1
