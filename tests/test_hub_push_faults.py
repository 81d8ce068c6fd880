"""A push that goes wrong leaves the branch as it was, and one line that says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_uploads import SIGNATURE
from push_lab import OTHERS, TOKEN, commits, files, log_in, repository, run, write_run

import deltakit as dk
from deltakit.errors import (
    ConfigError,
    DeltakitError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
)

COMMIT = "POST /api/models/org/news/commit"
PREUPLOAD = "POST /api/models/org/news/preupload"
PUT = "PUT /object/"

# Where the tests run in the background of a shell, their children ignore SIGINT at first.
INTERRUPTIBLE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('deltakit', run_name='__main__')"
)

# The client uploads with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with `org/news`, whose user "org" is logged in."""
    hub.add("org/news", {"notes.json": b"{}"})
    return log_in(hub, monkeypatch)


def told(error: type[DeltakitError], delta: Path, repo: str = "org/news", **options: bool) -> str:
    """The message of a push that fails; one line about the repository, and no token in it."""
    with pytest.raises(error) as caught:
        dk.push(delta, repo, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"hf://{repo}")
    assert "\n" not in message
    assert TOKEN not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def untouched(hub: HubServer) -> bool:
    """Whether `org/news` is as it was in the beginning."""
    return files(hub) == {"notes.json": b"{}"}


def test_nobody_is_logged_in(
    writer: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in; log in (hf auth login, or HF_TOKEN)" in told(
        HubAccessError, delta_file
    )
    assert writer.seen == []


def test_offline(writer: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE)" in told(HubUnavailableError, delta_file)
    assert writer.seen == []


def test_a_token_that_is_not_known(writer: HubServer, delta_file: Path) -> None:
    del writer.tokens[TOKEN]
    assert "does not accept your token (401)" in told(HubAccessError, delta_file)


@pytest.mark.parametrize("repo", ["org/news", "org/new"])
def test_a_token_that_may_only_read(writer: HubServer, delta_file: Path, repo: str) -> None:
    writer.readers.add(TOKEN)
    message = told(HubAccessError, delta_file, repo)
    assert "your token may not write there (403)" in message
    assert f"{writer.url}/settings/tokens" in message
    assert untouched(writer)


def test_repositories_of_others(
    writer: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHERS)
    assert "may not write there (403)" in told(HubAccessError, delta_file)
    repository(writer, "org/news").private = True
    assert "may not write there (403)" in told(HubAccessError, delta_file)
    repository(writer, "org/news").private = False
    repository(writer, "org/news").gated = True
    assert "may not write there (403)" in told(HubAccessError, delta_file)
    assert untouched(writer)


def test_nothing_is_made_where_that_was_not_asked_for(writer: HubServer, delta_file: Path) -> None:
    message = told(HubNotFoundError, delta_file, "org/gone", create=False)
    assert "the Hub shows no repository org/gone" in message
    code, _, err = run(delta_file, "org/news", "--no-create", "--revision", "dev")
    assert (code, "no branch dev in org/news" in err) == (1, True)
    assert list(repository(writer, "org/news").refs) == ["main"]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "route", ["GET /api/models/org/new", "POST /api/repos", PUT, "POST /api/models/org/new/commit"]
)
def test_what_passes_is_waited_for(
    writer: HubServer, delta_file: Path, status: int, route: str
) -> None:
    writer.fail(route, status, times=2)
    dk.push(delta_file, "org/new")
    assert files(writer, "org/new")["delta.sdelta"] == delta_file.read_bytes()
    assert commits(writer, "org/new") == 1


@pytest.mark.parametrize(
    ("route", "status", "error", "message"),
    [
        ("GET /api/models/org/news", 503, HubUnavailableError, "a problem of its own (503)"),
        (PREUPLOAD, 503, HubUnavailableError, "a problem of its own (503)"),
        (PREUPLOAD, 403, HubAccessError, "may not write there (403)"),
        (PREUPLOAD, 429, HubUnavailableError, "too many requests (429)"),
        ("POST /org/news.git/info/lfs", 402, HubAccessError, "no room for this (402)"),
        (PUT, 400, HubError, "the Hub refused the request (400)"),
        (PUT, 503, HubUnavailableError, "a problem of its own (503)"),
        ("POST /lfs/verify", 404, HubError, "the Hub refused the request (404)"),
        ("POST /api/validate-yaml", 400, HubError, "refuses the metadata of README.md"),
        (COMMIT, 400, HubError, "the Hub refused the request (400)"),
        (COMMIT, 401, HubAccessError, "log in again"),
        (COMMIT, 403, HubAccessError, "may not write there (403)"),
        (COMMIT, 409, HubConflictError, "changed while it was written to (409)"),
        (COMMIT, 412, HubConflictError, "changed while it was written to (412)"),
        (COMMIT, 503, HubUnavailableError, "a problem of its own (503)"),
    ],
)
def test_what_does_not_pass_is_told(
    writer: HubServer,
    delta_file: Path,
    route: str,
    status: int,
    error: type[DeltakitError],
    message: str,
) -> None:
    """Every request fails for good; the branch stays as it was, and later the push goes through."""
    writer.fail(route, status, times=100)
    assert message in told(error, delta_file)
    assert untouched(writer)


def test_what_failed_goes_through_later(writer: HubServer, delta_file: Path) -> None:
    writer.fail(COMMIT, 403)
    told(HubAccessError, delta_file)
    sent = len(writer.calls(PUT))
    dk.push(delta_file, "org/news")
    assert len(writer.calls(PUT)) == sent  # the store had it already
    assert commits(writer) == 2


def test_a_connection_dropped_while_sending(writer: HubServer, delta_file: Path) -> None:
    """Once is gone on with by the client; for good is told, and nothing is listed."""
    writer.cut(PUT, after=300, times=100)
    assert "the connection was lost" in told(HubUnavailableError, delta_file)
    assert untouched(writer)
    writer.faults.clear()
    writer.cut(PUT, after=300)
    dk.push(delta_file, "org/news")
    assert files(writer)["delta.sdelta"] == delta_file.read_bytes()


def test_a_hub_that_is_away(writer: HubServer, delta_file: Path) -> None:
    writer.stop()
    assert f"{writer.url} cannot be reached" in told(HubUnavailableError, delta_file)


def test_an_answer_to_the_commit_that_is_lost(writer: HubServer, delta_file: Path) -> None:
    """The commit was made, which is seen, and no other is."""
    writer.lose(COMMIT)
    report = dk.push(delta_file, "org/news")
    assert report.commit == repository(writer, "org/news").refs["main"]
    assert commits(writer) == 2
    assert len(writer.calls(COMMIT)) == 1


def test_pushes_of_other_files_meanwhile_are_kept(writer: HubServer, delta_file: Path) -> None:
    """The commit is made anew upon theirs, with a card made of theirs."""
    mine = b"---\nlicense: mit\n---\nWritten meanwhile.\n"
    writer.meanwhile(PREUPLOAD, lambda: writer.add("org/news", {"README.md": mine, "x.json": b"1"}))
    dk.push(delta_file, "org/news")
    there = files(writer)
    assert set(there) == {"notes.json", "x.json", "delta.sdelta", "README.md"}
    assert b"Written meanwhile." in there["README.md"]
    assert b"license: mit" in there["README.md"]
    assert commits(writer) == 3


def test_a_push_of_the_same_file_meanwhile_is_a_conflict(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    dk.save(dk.truncate(dk.load(delta_file), 5), tmp_path / "theirs.sdelta")
    theirs = (tmp_path / "theirs.sdelta").read_bytes()

    def overtake() -> None:
        writer.add("org/news", {"delta.sdelta": theirs})

    writer.meanwhile(PREUPLOAD, overtake)
    message = told(HubConflictError, delta_file)
    assert "somebody else published delta.sdelta meanwhile, so nothing was published" in message
    assert files(writer) == {"notes.json": b"{}", "delta.sdelta": theirs}
    repository(writer, "org/news").commit("main", {"delta.sdelta": None})
    writer.meanwhile(PREUPLOAD, overtake)
    dk.push(delta_file, "org/news", force=True)
    assert files(writer)["delta.sdelta"] == delta_file.read_bytes()


def test_a_push_of_the_same_bytes_meanwhile_is_none(writer: HubServer, delta_file: Path) -> None:
    same = {"delta.sdelta": delta_file.read_bytes()}
    writer.meanwhile(PREUPLOAD, lambda: writer.add("org/news", same))
    dk.push(delta_file, "org/news")
    assert set(files(writer)) == {"notes.json", "delta.sdelta", "README.md"}


def test_a_branch_that_never_rests(writer: HubServer, delta_file: Path) -> None:
    """The head is read again a bounded number of times."""
    numbers = iter(range(100))
    writer.meanwhile(
        PREUPLOAD, lambda: writer.add("org/news", {"x.json": b"%d" % next(numbers)}), times=100
    )
    assert "run the same command again" in told(HubConflictError, delta_file)
    assert len(writer.calls(COMMIT)) == 4


def test_two_pushes_at_once(writer: HubServer, delta_file: Path, tmp_path: Path) -> None:
    """Of different files: both are there in the end, whoever was first."""
    paths = [tmp_path / f"budget-{n}.sdelta" for n in (10, 20, 30)]
    for path in paths:
        dk.save(dk.truncate(dk.load(delta_file), int(path.stem[7:])), path)
    threads = [threading.Thread(target=dk.push, args=(path, "org/news")) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = files(writer)
    for path in paths:
        assert there[path.name] == path.read_bytes()
        assert path.name in there["README.md"].decode()


def test_the_other_way_of_uploading_breaks(
    writer: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xet, which users have by default and this Hub lacks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    message = told(HubUnavailableError, delta_file)
    assert (
        "the upload broke off; run the same command again, or with HF_HUB_DISABLE_XET=1" in message
    )
    assert untouched(writer)


def test_files_that_the_repository_ignores(writer: HubServer, delta_file: Path) -> None:
    """The client leaves them out without a word."""
    writer.add("org/news", {".gitignore": b"delta.sdelta"})
    message = told(HubError, delta_file)
    assert "does not have delta.sdelta as sent; the repository's .gitignore may name it" in message


def test_a_tag_that_is_taken_is_told_before_anything_is_sent(
    writer: HubServer, delta_file: Path
) -> None:
    repository(writer, "org/news").tag("v1")
    with pytest.raises(HubConflictError, match=r"the tag v1 is that of commit \w{12} already"):
        dk.push(delta_file, "org/news", tag="v1")
    assert untouched(writer)


@pytest.mark.parametrize("status", [403, 409, 503])
def test_a_tag_that_fails_leaves_the_commit(
    writer: HubServer, delta_file: Path, status: int
) -> None:
    writer.fail("POST /api/models/org/news/tag", status, times=100)
    with pytest.raises(HubError, match="is published, but the tag v1 is not set; run the same"):
        dk.push(delta_file, "org/news", tag="v1")
    assert files(writer)["delta.sdelta"] == delta_file.read_bytes()
    writer.faults.clear()
    report = dk.push(delta_file, "org/news", tag="v1")
    assert report.changed is False
    assert repository(writer, "org/news").refs["v1"] == report.commit


def test_an_answer_to_the_tag_that_is_lost(writer: HubServer, delta_file: Path) -> None:
    writer.lose("POST /api/models/org/news/tag")
    commit = dk.push(delta_file, "org/news", tag="v1").commit
    assert repository(writer, "org/news").refs["v1"] == commit


def test_a_card_that_is_no_text(writer: HubServer, delta_file: Path) -> None:
    writer.add("org/news", {"README.md": b"caf\xe9"})
    with pytest.raises(ConfigError, match=r"README\.md is not UTF-8 text"):
        dk.push(delta_file, "org/news")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_push_that_is_stopped_lists_nothing(
    writer: HubServer, delta_file: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """Stopped while it sends; a later push is not hindered."""
    writer.meanwhile(PUT, lambda: (os.kill(process.pid, sent), gone.wait(60)))
    gone = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "push", str(delta_file), "org/news"],
        env={**os.environ, **environment(writer, tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate()
    gone.set()
    codes = {signal.SIGINT: 130, signal.SIGKILL: -9}
    assert process.returncode == codes[sent], err
    assert (out, "Traceback" in err) == ("", False)
    assert untouched(writer)
    dk.push(delta_file, "org/news")
    assert files(writer)["delta.sdelta"] == delta_file.read_bytes()


def test_no_token_and_no_signature_is_told_or_kept(
    writer: HubServer, delta_file: Path, tmp_path: Path
) -> None:
    """Of a push through trouble, as a program of its own."""
    folder = write_run(tmp_path / "run", delta_file)
    (folder / "metrics.json").write_text("{}")
    writer.fail(PUT, 503)
    writer.fail(COMMIT, 503)
    writer.cut(PUT, after=10)
    env = {**os.environ, **environment(writer, tmp_path)}
    command = [sys.executable, "-m", "deltakit", "push", str(folder), "org/news", "--tag", "v1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Retrying in 1" in done.stderr  # the client's own words, which are let through
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    sent = b"".join(files(writer).values())
    for secret in (TOKEN, SIGNATURE):
        assert secret not in done.stdout + done.stderr
        assert secret.encode() not in kept + sent


def environment(hub: HubServer, folder: Path) -> dict[str, str]:
    """What makes a program of its own use the Hub for tests."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
