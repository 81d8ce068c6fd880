"""What goes wrong with the Hub is told in one line that says what to do, without any token."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

import deltakit as dk
from deltakit.errors import (
    ChecksumError,
    DeltakitError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    OutputError,
)
from deltakit.formats.checkpoint import Checkpoint
from deltakit.hub import failures

API = "GET /api/models/org/news"
OBJECT = "GET /object/"
TOKEN = "hf_sEcReT0123456789"


@pytest.fixture
def news(hub: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with `org/news`, whose user has a token; nobody waits before trying again."""
    hub.add("org/news", {"delta.sdelta": delta_file.read_bytes(), "config.json": b"{}"})
    hub.tokens[TOKEN] = "org"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    waited: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setattr(hub, "waited", waited, raising=False)
    return hub


def told(error: type[DeltakitError], location: str = "hf://org/news") -> str:
    """The message of loading a delta that fails; one line, and no token in it or around it."""
    with pytest.raises(error) as caught:
        dk.load(location)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(location)
    assert TOKEN not in message
    assert caught.value.__suppress_context__
    return message


def test_an_unknown_repository(news: HubServer) -> None:
    assert "no repository org/gone; check the name" in told(HubNotFoundError, "hf://org/gone")


def test_a_private_repository_of_others(news: HubServer) -> None:
    news.add("other/x", {"delta.sdelta": b"x"}).private = True
    assert "log in (hf auth login, or HF_TOKEN)" in told(HubNotFoundError, "hf://other/x")


def test_an_unknown_revision(news: HubServer) -> None:
    message = told(HubNotFoundError, "hf://org/news@v9")
    assert "org/news has no revision 'v9'" in message


def test_a_gated_repository(news: HubServer) -> None:
    news.add("other/gated", {"delta.sdelta": b"x"}).gated = True
    with pytest.raises(
        HubAccessError, match=r"is gated: ask for access on http.*/gated,"
    ) as caught:
        dk.load("hf://other/gated")
    assert TOKEN not in str(caught.value)


def test_a_token_that_is_not_known(news: HubServer) -> None:
    del news.tokens[TOKEN]
    assert "does not accept your token (401); log in again" in told(HubAccessError)


@pytest.mark.parametrize("broken", [f"{TOKEN}é", f"{TOKEN}\0"])
def test_a_token_that_is_none(
    news: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    """The HTTP library quotes a header that it refuses (as of a token file in UTF-16)."""
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).parent.mkdir()
    Path(constants.HF_TOKEN_PATH).write_text(broken, "utf-8")
    assert "holds characters that no token has" in told(HubAccessError)
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (403, HubAccessError, "your token may not read this (403)"),
        (418, HubError, "the Hub refused the request (418)"),
        (429, HubUnavailableError, "too many requests (429)"),
        (503, HubUnavailableError, "a problem of its own (503); try again later"),
    ],
)
def test_statuses(news: HubServer, status: int, error: type[DeltakitError], message: str) -> None:
    news.fail(API, status, times=10)
    assert message in told(error)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(news: HubServer, status: int, delta_file: Path) -> None:
    news.fail(API, status, times=2, headers={"Retry-After": "9"})
    assert dk.load("hf://org/news").equals(dk.load(delta_file))
    assert news.waited == [9.0, 9.0]  # type: ignore[attr-defined]


def test_what_does_not_pass_is_asked_once(news: HubServer) -> None:
    news.fail(API, 403, times=10)
    told(HubAccessError)
    assert len(news.calls("GET /api")) == 1


def test_ranges_are_tried_again_too(news: HubServer) -> None:
    news.fail("GET /org/news/resolve/", 503)
    news.drop(OBJECT, after=10)
    assert dk.inspect("hf://org/news").entries == 110


def test_a_hub_that_is_away(news: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    news.stop()
    assert f"{news.url} cannot be reached" in told(HubUnavailableError)
    secret = news.url.replace("//", f"//me:{TOKEN}@")
    monkeypatch.setattr(constants, "ENDPOINT", secret)
    assert f"{news.url} cannot be reached" in told(HubUnavailableError)


@pytest.mark.parametrize("trouble", ["away", "busy"])
def test_the_cache_stands_in_and_a_note_says_so(
    news: HubServer, delta_file: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    import huggingface_hub

    dk.load("hf://org/news")
    commit = news.repos["model", "org/news"].refs["main"]
    if trouble == "away":
        huggingface_hub.close_session()
        news.stop()
    else:
        news.fail(API, 503, times=10)
    assert dk.load("hf://org/news").equals(dk.load(delta_file))
    assert f"meanwhile commit {commit[:12]} from the cache is used" in caplog.text
    assert news.waited == []  # type: ignore[attr-defined]
    with pytest.raises(HubUnavailableError):
        Checkpoint("hf://org/news")


def test_a_dropped_download_goes_on(news: HubServer, delta_file: Path) -> None:
    news.drop(OBJECT, after=100)
    assert dk.load("hf://org/news").equals(dk.load(delta_file))


def test_a_download_that_ends_early(news: HubServer, delta_file: Path) -> None:
    news.shorten(OBJECT)
    assert "the download ended before its last byte; run the same" in told(
        HubUnavailableError, "hf://org/news@" + news.repos["model", "org/news"].refs["main"]
    ).replace("/delta.sdelta", "")
    assert dk.load("hf://org/news").equals(dk.load(delta_file))


@pytest.mark.parametrize("name", ["delta.sdelta", "config.json"])
def test_wrong_bytes_of_the_right_length_are_refused_and_removed(
    news: HubServer, checkpoint: Checkpoint, name: str
) -> None:
    """Large files have a sha256 on record, small ones git's sha1."""
    news.add("org/news", {"model.safetensors": checkpoint.path.read_bytes()})
    route = OBJECT if name == "delta.sdelta" else "GET /org/news/resolve"
    news.corrupt(route)

    def use() -> object:
        is_delta = name == "delta.sdelta"
        return dk.load("hf://org/news") if is_delta else Checkpoint("hf://org/news").config()

    with pytest.raises(ChecksumError, match=r"removed from the cache, run the same command again"):
        use()
    kept = [p for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.name == name]
    assert kept == []
    assert use() is not None


def test_a_full_disk(news: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says so while the client writes; a real full disk needs a real file system."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OutputError, match=r"no space left for the download in .*HF_HOME"):
        dk.load("hf://org/news")


def test_a_cache_that_cannot_be_written(news: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file where the cache should be")
    with pytest.raises(OutputError, match="cannot keep the download in"):
        dk.load("hf://org/news")


def test_a_server_that_is_no_hub(news: HubServer) -> None:
    news.fail("HEAD /org/news/resolve/", 200, times=10)
    with pytest.raises(HubError, match="does not answer as a Hub does; check HF_ENDPOINT"):
        dk.load("hf://org/news")
