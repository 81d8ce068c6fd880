"""Checkpoints on the Hub, weight file by weight file: what diff, verify and jobs download of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
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
from safetensors.numpy import load_file, save_file

import deltakit as dk
from deltakit.errors import HubUnavailableError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_elsewhere(tmp_path, monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base's folder."""
    return write_base(tmp_path / "local")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The base with changes in every file."""
    folder = write_base(tmp_path / "tuned")
    for name in SHARDS:
        tensors = {key: array.copy() for key, array in load_file(folder / name).items()}
        for array in tensors.values():
            array[::7, 3] += 0.5
        save_file(tensors, folder / name, {"format": "pt"})
    return folder


@pytest.fixture
def published(hub: HubServer, base: Path, tuned: Path) -> HubServer:
    """A Hub with both as `org/base` and `org/tuned`."""
    for folder in (base, tuned):
        name = "org/base" if folder == base else "org/tuned"
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    return hub


def downloads(hub: HubServer, repo: str = "org/base", since: int = 0) -> list[str]:
    """The weight files of a repository that were sent whole, in order."""
    blobs = hub.repos["model", repo].files("main")
    names = {f"GET /object/{blobs[name].sha256}": name for name in SHARDS}
    seen = hub.seen[since:]
    return [names[each.call] for each in seen if each.call in names and each.range is None]


def most_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many large files the cache holds whenever another one is asked for."""
    found: list[int] = []
    fault = hub.fault

    def seen(call: str) -> Any:
        if call.startswith("GET /object/"):
            found.append(objects())
        return fault(call)

    monkeypatch.setattr(hub, "fault", seen)
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_a_job_downloads_its_own_files(published: HubServer, base: Path, keep: bool) -> None:
    delta = saved(delta_of(base, commit_of(published)))
    dk.merge(base, delta, "here")
    for number in (2, 3, 1):
        before = len(published.seen)
        dk.merge(None, delta, "there", shard=(number, 3), keep_base=keep)
        assert downloads(published, since=before) == [SHARDS[number - 1]]
        assert (SHARDS[number - 1] in cached()) == keep
    assert contents("there") == contents("here")
    assert len(cached()) == 3 * keep


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("options", [{}, {"mode": "add"}, {"budget": 11}], ids=str)
def test_a_diff_takes_one_file_at_a_time(
    published: HubServer,
    base: Path,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
    options: dict[str, Any],
) -> None:
    """Of both sides, which are matched by their tensors; nothing but the output is left behind."""
    commits = {name: published.repos["model", name].refs["main"] for name in ("org/base",)}
    at = most_at_once(published, monkeypatch)
    report = dk.diff(
        "hf://org/base", "hf://org/tuned", out="o.sdelta", keep_downloads=keep, **options
    )
    assert downloads(published) == downloads(published, "org/tuned") == SHARDS
    assert max(at) <= (5 if keep else 1)
    assert len(cached()) == 6 * keep
    assert [path.name for path in Path().iterdir()] == ["o.sdelta"]
    here = dk.diff(base, tuned, **options)
    there = dk.load("o.sdelta")
    assert there.base is not None
    assert (there.base.model_id, there.base.revision) == ("org/base", commits["org/base"])
    assert report.entries == here.nnz
    assert list(there.tensors) == list(here.tensors)
    assert all(tensor.equals(here.tensors[name]) for name, tensor in there.tensors.items())
    held = dk.diff("hf://org/base", tuned, keep_downloads=keep, **options)
    assert held.equals(there)


def test_jobs_of_a_diff_download_their_own_files(
    published: HubServer, base: Path, tuned: Path
) -> None:
    for number in (3, 1, 2):
        before = len(published.seen)
        dk.diff("hf://org/base", tuned, out="o.sdelta", shard=(number, 3), keep_downloads=False)
        assert downloads(published, since=before) == [SHARDS[number - 1]]
    assert cached() == []
    dk.diff("hf://org/base", tuned, out="p.sdelta")
    assert Path("o.sdelta").read_bytes() == Path("p.sdelta").read_bytes()


def test_a_diff_that_loses_the_hub_goes_on_where_it_stopped(
    published: HubServer, base: Path, tuned: Path
) -> None:
    sha256 = published.repos["model", "org/base"].files("main")[SHARDS[1]].sha256
    published.shorten(f"GET /object/{sha256}", times=2)
    with pytest.raises(HubUnavailableError):
        dk.diff("hf://org/base", tuned, out="o.sdelta", keep_downloads=False)
    assert [path.name for path in Path().iterdir()] == ["o.part-00001-of-00003.sdelta"]
    before = len(published.seen)
    dk.diff("hf://org/base", tuned, out="o.sdelta", keep_downloads=False)
    assert downloads(published, since=before) == SHARDS[1:]
    assert dk.load("o.sdelta").nnz == dk.diff(base, tuned).nnz
    assert [path.name for path in Path().iterdir()] == ["o.sdelta"]


def delta_in(base: Path, names: tuple[str, ...], revision: str | None = None) -> str:
    """A file with the entries of `delta_of` in some of its tensors alone."""
    delta = delta_of(base, revision)
    return saved(
        dk.SparseDelta(tensors={name: delta.tensors[name] for name in names}, base=delta.base)
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_verify_downloads_what_the_delta_touches(
    published: HubServer, base: Path, keep: bool, recorded: bool
) -> None:
    delta = delta_in(base, ("w2",), commit_of(published))
    given: dict[str, Any] = {"recorded_base": True} if recorded else {"base": "hf://org/base"}
    report = dk.verify(delta, keep_base=keep, workers=2, **given)
    assert (report.ok, report.entries) == (True, 20)
    assert downloads(published) == [SHARDS[1]]
    assert cached() == SHARDS[1:2] * keep


def test_verify_takes_one_file_at_a_time_and_jobs_their_own(
    published: HubServer, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = delta_in(base, ("w0", "w2", "w5"), commit_of(published))
    at = most_at_once(published, monkeypatch)
    assert dk.verify(delta, "hf://org/base", keep_base=False).ok
    assert (downloads(published), max(at)) == (SHARDS, 0)
    for number in (1, 2, 3):
        before = len(published.seen)
        report = dk.verify(delta, "hf://org/base", keep_base=False, shard=(number, 3))
        assert (report.ok, report.tensors) == (True, 1)
        assert downloads(published, since=before) == [SHARDS[number - 1]]
    other = {SHARDS[2]: (write_base(base.parent / "b", 9) / SHARDS[2]).read_bytes()}
    published.add("org/base", other)
    assert [run("verify", delta, "--base", "hf://org/base", "--shard", f"{n}/3", "--no-keep-base")[0]
            for n in (1, 2, 3)] == [0, 0, 1]  # fmt: skip


def test_a_hub_that_is_away_is_no_problem_of_the_delta(published: HubServer, base: Path) -> None:
    """It is an error of its own, so that nobody takes a sound delta for a broken one."""
    delta = delta_in(base, ("w2",), commit_of(published))
    sha256 = published.repos["model", "org/base"].files("main")[SHARDS[1]].sha256
    published.shorten(f"GET /object/{sha256}", times=2)
    with pytest.raises(HubUnavailableError):
        dk.verify(delta, "hf://org/base")
    assert np.array_equal(cached(), [])
