"""Bases found by what deltas record: other values, broken shards, full disks, stopped and killed merges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from identity_lab import (
    ROOT,
    SHARDS,
    cached,
    commit_of,
    contents,
    delta_of,
    go_elsewhere,
    objects,
    run,
    saved,
    write_base,
)

import deltakit as dk
from deltakit.errors import (
    BaseMismatchError,
    ChecksumError,
    ConfigError,
    CoordinateError,
    HubUnavailableError,
    OutputError,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_elsewhere(tmp_path, monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base's folder."""
    return write_base(tmp_path / "local")


@pytest.fixture
def published(hub: HubServer, base: Path) -> HubServer:
    """A Hub with the base as `org/base`."""
    hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    return hub


@pytest.fixture
def delta(published: HubServer, base: Path) -> dk.SparseDelta:
    """A delta of the base, which it records."""
    return delta_of(base, commit_of(published))


def test_several_deltas_must_agree(published: HubServer, delta: dk.SparseDelta, base: Path) -> None:
    dk.merge(base, [delta, delta], "here", weights=[0.5, 0.5])
    unpinned = delta_of(base, None)  # fits any revision, whose values are compared
    report = dk.merge(None, [unpinned, delta], "there", weights=[0.5, 0.5])
    assert contents("there") == contents("here")
    assert report.base_revision == commit_of(published)
    for other in (delta_of(base, "0" * 40), delta_of(base, None, "org/other")):
        with pytest.raises(
            BaseMismatchError, match=r"delta 0 was made for hf://org/base@.*, delta 1 for hf://org/"
        ):
            dk.merge(None, [delta, other], "out")
    bare = dk.SparseDelta(tensors=delta.tensors)
    with pytest.raises(ConfigError, match="delta 1 records none"):
        dk.merge(None, [delta, bare], "out")


def test_other_values_are_refused_when_they_come(
    published: HubServer, delta: dk.SparseDelta, base: Path
) -> None:
    """Nothing is left at the place, in the folder around it or, if so asked, in the cache."""
    other = write_base(base.parent / "newer", seed=9)
    last = {SHARDS[2]: (other / SHARDS[2]).read_bytes()}
    published.add("org/base", last)
    wrong = replace(delta, base=replace(delta.base, revision=commit_of(published)))
    with pytest.raises(BaseMismatchError, match=r"delta 0: .* tensor 'w5' has other values"):
        dk.merge(None, wrong, "out", keep_base=False)
    assert list(Path().iterdir()) == []
    assert cached() == []
    report = dk.merge(None, wrong, "out", allow_base_mismatch=True)
    assert sum("'w5': the base has other values" in note for note in report.notes) == 1


def test_another_shape_is_refused_before_anything_comes(
    published: HubServer, delta: dk.SparseDelta
) -> None:
    tensor = replace(delta.tensors["w5"], shape=(20, 60))
    wrong = dk.SparseDelta(tensors={**delta.tensors, "w5": tensor}, base=delta.base)
    with pytest.raises(CoordinateError, match=r"shape \[20, 60\] in the delta and \[40, 30\]"):
        dk.merge(None, wrong, "out")
    assert cached() == []


@pytest.mark.parametrize(
    ("fault", "error"), [("corrupt", ChecksumError), ("shorten", HubUnavailableError)]
)
def test_a_shard_that_comes_broken(
    published: HubServer, delta: dk.SparseDelta, base: Path, fault: str, error: type[Exception]
) -> None:
    """The last one, behind its header, which is read first and lies before the wrong half. What was
    merged before it is kept for the next try, which downloads that one alone."""
    sha256 = published.repos["model", "org/base"].files("main")[SHARDS[2]].sha256
    getattr(published, fault)(f"GET /object/{sha256}", times=2)
    with pytest.raises(error, match="run the same command again"):
        dk.merge(None, delta, "out", keep_base=False)
    (partial,) = Path().iterdir()
    assert sorted(path.name for path in partial.glob("*.safetensors")) == SHARDS[:2]
    assert (cached(), objects()) == ([], 0)
    before = len(published.seen)
    report = dk.merge(None, delta, "out", keep_base=False)
    assert "2 weight files were finished by an earlier merge" in report.notes
    whole = [each.call for each in published.seen[before:] if each.range is None]
    assert [call for call in whole if "/object/" in call] == [f"GET /object/{sha256}"]
    dk.merge(base, delta, "here")
    assert contents("out") == contents("here")
    assert not partial.exists()


def test_a_dropped_connection_goes_on(
    published: HubServer, delta: dk.SparseDelta, base: Path
) -> None:
    published.drop("GET /object/", after=100, times=3)
    dk.merge(None, delta, "out")
    dk.merge(base, delta, "here")
    assert contents("out") == contents("here")


def test_a_cache_without_room_is_one_line(
    delta: dk.SparseDelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltakit.hub.cache.room", lambda: 5000)
    with pytest.raises(OutputError, match=r"no space left for the download in .*HF_HOME"):
        dk.merge(None, delta, "out")
    assert list(Path().iterdir()) == []


def stopped_at(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str, how: signal.Signals
) -> None:
    """`deltakit merge a.sdelta -o out --no-keep-base`, stopped when a shard is asked for whole."""
    route = f"GET /object/{hub.repos['model', 'org/base'].files('main')[shard].sha256}"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "deltakit", "merge", "a.sdelta", "-o", "out", "--no-keep-base"]
    running = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    asked, fault = [], hub.fault

    def seen(call: str) -> Any:
        if call == route:
            asked.append(call)
            if len(asked) == 2:  # the first asks for the header
                running.send_signal(how)
                running.wait()
        return fault(call)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "fault", seen)
        assert running.wait() != 0
    assert len(asked) == 2


def test_a_merge_that_is_stopped_leaves_nothing(
    published: HubServer, delta: dk.SparseDelta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dk.save(delta, "a.sdelta")
    stopped_at(published, tmp_path, monkeypatch, SHARDS[1], signal.SIGTERM)
    assert [path.name for path in Path().iterdir()] == ["a.sdelta"]
    assert (cached(), objects()) == ([], 0)


def test_a_merge_that_is_killed_is_gone_on_with(
    published: HubServer,
    delta: dk.SparseDelta,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dk.save(delta, "a.sdelta")
    stopped_at(published, tmp_path, monkeypatch, SHARDS[1], signal.SIGKILL)
    assert not Path("out").exists()
    before = len(published.seen)
    report = dk.merge(None, "a.sdelta", "out", keep_base=False)
    whole = {each.call for each in published.seen[before:] if each.range is None}
    blobs = published.repos["model", "org/base"].files("main")
    assert [f"GET /object/{blobs[name].sha256}" in whole for name in SHARDS] == [False, True, True]
    assert "1 weight files were finished by an earlier merge" in report.notes
    dk.merge(base, "a.sdelta", "here")
    assert contents("out") == contents("here")
    assert cached() == []


def test_verifying_against_the_recorded_base(
    published: HubServer, delta: dk.SparseDelta, base: Path
) -> None:
    at = f"hf://org/base@{commit_of(published)}"
    code, out, err = run("verify", saved(delta), "--recorded-base")
    assert (code, err) == (0, f"Note: the base is {at}, as a.sdelta records\n")
    assert out.startswith(f"a.sdelta: sound, and {at} is its base; 60 entries")
    published.add(
        "org/base", {SHARDS[0]: (write_base(base.parent / "b", 9) / SHARDS[0]).read_bytes()}
    )
    moved = replace(delta, base=replace(delta.base, revision=commit_of(published)))
    code, _, err = run("verify", saved(moved), "--recorded-base")
    assert code == 1
    assert "tensor 'w0' has other values" in err
    code, _, err = run("verify", saved(delta_of(base, None, "base")), "--recorded-base")
    assert (code, err.count("\n")) == (1, 1)
    assert err.endswith("no repository of the Hub); write: deltakit verify DELTA --base BASE\n")
    code, _, err = run("verify", "a.sdelta", "--recorded-base", "--base", base)
    assert code == 2
    assert "give one" in err
