"""Merging without a BASE: the repository and commit that deltas record, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from identity_lab import (
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
    ConfigError,
    HubAccessError,
    HubNotFoundError,
    HubUnavailableError,
)
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import encode


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


@pytest.mark.parametrize("options", [{}, {"dtype": "trained"}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_the_bits_are_those_of_merging_into_a_local_copy(
    delta: dk.SparseDelta, base: Path, keep: bool, options: dict[str, Any]
) -> None:
    here = dk.merge(base, delta, "here", **options)
    report = dk.merge(None, delta, "there", keep_base=keep, **options)
    assert contents("there") == contents("here")
    same = ("bytes", "tensors", "entries", "extras", "files", "peak_memory")
    assert [getattr(report, name) for name in same] == [getattr(here, name) for name in same]
    assert not any(path.is_symlink() for path in Path("there").iterdir())


def test_the_report_names_base_and_commit(published: HubServer, delta: dk.SparseDelta) -> None:
    commit = commit_of(published)
    published.add("org/news", {"delta.sdelta": encode(delta)})
    code, out, err = run("merge", "hf://org/news")
    assert code == 0
    assert out.startswith("base-news: ")
    assert err.startswith(f"Note: the base is hf://org/base@{commit}, as hf://org/news records\n")
    code, out, _ = run("merge", "hf://org/news", "-o", "again", "--json")
    told = json.loads(out)
    assert told["base"] == f"hf://org/base@{commit}"
    assert (told["base_id"], told["base_revision"]) == ("org/base", commit)


def test_a_local_delta_finds_its_base_too(delta: dk.SparseDelta, base: Path) -> None:
    Path("runs").mkdir()
    dk.save(delta, "runs/a.sdelta")
    assert run("merge", "runs/a.sdelta")[0] == 0
    dk.merge(base, delta, "here")
    assert contents("runs/base-a") == contents("here")


def test_shards_come_once_and_stay(published: HubServer, delta: dk.SparseDelta) -> None:
    dk.merge(None, delta, "first")
    asked = [each.range for each in published.seen if each.call.startswith("GET /object/")]
    assert asked == ["bytes=0-65535"] * 3 + [None] * 3  # the headers, then the files
    assert cached() == SHARDS
    before = len(published.seen)
    dk.merge(None, delta, "second")
    calls = [each.call for each in published.seen[before:]]
    commit = commit_of(published)
    assert calls == [f"GET /api/models/org/base/revision/{commit}", "GET /api/models/org/base"]
    assert contents("first") == contents("second")


def watch(hub: HubServer, monkeypatch: pytest.MonkeyPatch, what: Callable[[], int]) -> list[int]:
    """What is measured whenever a large file is asked for."""
    found: list[int] = []
    fault = hub.fault

    def seen(call: str) -> Any:
        if call.startswith("GET /object/"):
            found.append(what())
        return fault(call)

    monkeypatch.setattr(hub, "fault", seen)
    return found


def test_the_disk_holds_one_shard_at_a_time(
    published: HubServer, delta: dk.SparseDelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = watch(published, monkeypatch, objects)
    dk.merge(None, delta, "out", keep_base=False)
    assert len(held) == 6
    assert max(held) == 0  # nothing of the others is there when one begins to come
    assert (cached(), objects()) == ([], 0)


def test_what_the_cache_had_before_stays(published: HubServer, delta: dk.SparseDelta) -> None:
    Checkpoint(f"hf://org/base/{SHARDS[1]}")
    code, _, _ = run("merge", "hf://org/base", saved(delta), "--no-keep-base", "-o", "out")
    assert code == 0
    assert (cached(), objects()) == ([SHARDS[1]], 1)


def test_a_dry_run_downloads_no_weights(published: HubServer, delta: dk.SparseDelta) -> None:
    report = dk.merge(None, delta, "out", dry_run=True)
    assert cached() == []
    assert any("base values are compared when the base is downloaded" in n for n in report.notes)
    assert dk.merge(None, delta, "out").bytes == report.bytes


def test_one_file_as_the_output(delta: dk.SparseDelta, base: Path) -> None:
    dk.merge(base, delta, "here.safetensors")
    dk.merge(None, delta, "there.safetensors")
    assert Path("there.safetensors").read_bytes() == Path("here.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"let go of \(--no-keep-base\) by merges into a folder"):
        dk.merge(None, delta, "again.safetensors", keep_base=False)


@pytest.mark.parametrize(
    "place", ["deep", "deep/model.safetensors.index.json", f"deep/{SHARDS[0]}"]
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_base_in_a_folder_of_its_repository(
    hub: HubServer, delta: dk.SparseDelta, base: Path, place: str, keep: bool
) -> None:
    """A single shard is a lone file, which merges to a lone file and stays."""
    hub.add("org/base", {f"deep/{name}": data for name, data in contents(base).items()})
    lone = place.endswith(SHARDS[0])
    if lone:
        delta = dk.SparseDelta(tensors={"w0": delta.tensors["w0"]}, base=delta.base)
    out = ".safetensors" if lone else ""
    dk.merge(base / SHARDS[0] if lone else base, delta, f"here{out}")
    dk.merge(f"hf://org/base/{place}", delta, f"there{out}", keep_base=keep or lone)
    both = [Path(f"{name}{out}") for name in ("here", "there")]
    here, there = [path.read_bytes() if lone else contents(path) for path in both]
    assert there == here
    assert len(cached()) == (1 if lone else 3 * keep)


def test_stacking_by_a_method_first(delta: dk.SparseDelta, base: Path) -> None:
    both = [delta, dk.scale(delta, 0.5)]
    dk.merge(base, both, "here", method="ties", density=0.5)
    dk.merge(None, both, "there", method="ties", density=0.5, keep_base=False)
    assert contents("there") == contents("here")


def test_offline_the_cache_serves(
    published: HubServer, delta: dk.SparseDelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubUnavailableError, match=r"that of delta 0 cannot be had: .* offline mode"
    ):
        dk.merge(None, delta, "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    dk.merge(None, delta, "online")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(published.seen)
    dk.merge(None, delta, "out")
    assert contents("out") == contents("online")
    assert len(published.seen) == before


def test_a_base_that_moved_on(published: HubServer, delta: dk.SparseDelta, base: Path) -> None:
    old = commit_of(published)
    other = write_base(base.parent / "newer", seed=9)
    published.add("org/base", {path.name: path.read_bytes() for path in other.iterdir()})
    code, _, err = run("merge", saved(delta), "-o", "out")
    assert code == 0
    assert f"Note: the base is hf://org/base@{old}, as a.sdelta records\n" in err
    assert (
        f"Note: org/base has moved on to {commit_of(published)} since a.sdelta was made; its own "
        "base is taken\n"
    ) in err
    dk.merge(base, delta, "here")
    assert contents("out") == contents("here")


def test_a_commit_that_is_gone(published: HubServer, delta: dk.SparseDelta) -> None:
    repo = published.repos["model", "org/base"]
    old = commit_of(published)
    published.add("org/base", {"README.md": b"squashed"})
    del repo.commits[old]
    code, _, err = run("merge", saved(delta), "-o", "out")
    assert (code, Path("out").exists()) == (1, False)
    assert err == (
        f"Error: a.sdelta was made for hf://org/base@{old}, a revision that the Hub no longer has; "
        "give a copy of that base as BASE, or try the present one, whose values are compared first: "
        "deltakit merge hf://org/base DELTA\n"
    )
    assert run("merge", "hf://org/base", "a.sdelta", "-o", "out")[0] == 0


def test_a_commit_that_is_gone_but_cached(published: HubServer, delta: dk.SparseDelta) -> None:
    dk.merge(None, delta, "before")
    old = commit_of(published)
    published.add("org/base", {"README.md": b"squashed"})
    del published.repos["model", "org/base"].commits[old]
    report = dk.merge(None, delta, "after")
    assert any("is no longer on the Hub; the copy in the cache is used" in n for n in report.notes)
    assert contents("after") == contents("before")


def test_a_base_that_one_may_not_read(published: HubServer, delta: dk.SparseDelta) -> None:
    repo = published.repos["model", "org/base"]
    repo.gated = True
    with pytest.raises(HubAccessError, match=r"org/base@\w+.* is gated: ask for access"):
        dk.merge(None, delta, "out")
    repo.private = True
    with pytest.raises(HubNotFoundError, match=r"that of delta 0 cannot be had: .* log in"):
        dk.merge(None, delta, "out")
    assert not Path("out").exists()


def test_no_revision_is_the_newest(published: HubServer, base: Path) -> None:
    report = dk.merge(None, delta_of(base, None), "out")
    commit = commit_of(published)
    assert report.notes[0] == (
        f"the base is hf://org/base@{commit}, the newest, as delta 0 records no revision"
    )


@pytest.mark.parametrize("model_id", [None, "base", "/models/base", "../base", "org/base/sub"])
def test_a_delta_that_names_no_repository_needs_a_base(base: Path, model_id: str | None) -> None:
    code, _, err = run("merge", saved(delta_of(base, None, model_id)))
    assert code == 1
    why = (
        "no base given, and a.sdelta records none"
        if model_id is None
        else f"no base given (a.sdelta was made for {model_id}, which is no repository of the Hub)"
    )
    assert err == f"Error: {why}; write: deltakit merge BASE DELTA\n"


def test_in_place_needs_a_base(delta: dk.SparseDelta) -> None:
    code, _, err = run("merge", saved(delta), "--in-place")
    assert code == 1
    assert "no base given, and --in-place changes one on this machine" in err
