"""Merging without a BASE: the repository and commit that deltas record, shard by shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_sharded
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import constants

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import (
    BaseMismatchError,
    ChecksumError,
    ConfigError,
    CoordinateError,
    HubAccessError,
    HubNotFoundError,
    HubUnavailableError,
    OutputError,
)
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import encode
from deltakit.hub import failures
from deltakit.identity import identify

ROOT = Path(__file__).resolve().parents[1]
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that holds nothing; nobody waits before trying again."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)


def write_base(folder: Path, seed: int = 0) -> Path:
    """Three shards of two tensors each, w0 to w5 [40, 30], and what belongs to a model."""
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((40, 30)).astype(np.float32) for _ in range(6)]
    shards = [{f"w{n}": arrays[n] for n in pair} for pair in ((0, 1), (2, 3), (4, 5))]
    write_sharded(folder, list(shards), {"model_type": "bert", "num_labels": 2})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base's folder."""
    return write_base(tmp_path / "local")


@pytest.fixture
def published(hub: HubServer, base: Path) -> HubServer:
    """A Hub with the base as `org/base`."""
    hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    return hub


def commit_of(hub: HubServer) -> str:
    """The newest commit of the base."""
    return hub.repos["model", "org/base"].refs["main"]


def delta_of(base: Path, revision: str | None, model_id: str | None = "org/base") -> dk.SparseDelta:
    """20 entries in each of w0, w2 and w5, a new head, and the base that they record."""
    random = np.random.default_rng(1)
    tensors = {
        name: dk.TensorDelta(
            name=name,
            shape=(40, 30),
            dtype="float32",
            mode="add",
            indices=np.sort(random.choice(1200, 20, replace=False)),
            values=random.standard_normal(20).astype(np.float32),
            trained_dtype="bfloat16",
        )
        for name in ("w0", "w2", "w5")
    }
    touched = {name: tensor.indices for name, tensor in tensors.items()}
    identity = identify(Checkpoint(base), touched, dict.fromkeys(tensors, "bfloat16"))
    return dk.SparseDelta(
        tensors=tensors,
        extras={"head.weight": np.ones((3, 30), np.float32)},
        base=replace(identity, model_id=model_id, revision=revision),
        config={"num_labels": 3},
    )


@pytest.fixture
def delta(published: HubServer, base: Path) -> dk.SparseDelta:
    """A delta of the base, which it records."""
    return delta_of(base, commit_of(published))


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def contents(folder: str | Path) -> dict[str, bytes]:
    """Name -> bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def cached() -> list[str]:
    """The weight files that the cache holds."""
    found = Path(constants.HF_HUB_CACHE).rglob("snapshots/**/*.safetensors")
    return sorted(path.name for path in found if path.is_file())


def objects() -> int:
    """Large files whose bytes the cache holds."""
    blobs = Path(constants.HF_HUB_CACHE).rglob("blobs/*")
    return sum(path.is_file() and path.stat().st_size > 4000 for path in blobs)


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
    code, _, _ = run("merge", "hf://org/base", _saved(delta), "--no-keep-base", "-o", "out")
    assert code == 0
    assert (cached(), objects()) == ([SHARDS[1]], 1)


def _saved(delta: dk.SparseDelta) -> str:
    dk.save(delta, "a.sdelta")
    return "a.sdelta"


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
    code, _, err = run("merge", _saved(delta), "-o", "out")
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
    code, _, err = run("merge", _saved(delta), "-o", "out")
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
    code, _, err = run("merge", _saved(delta_of(base, None, model_id)))
    assert code == 1
    why = (
        "no base given, and a.sdelta records none"
        if model_id is None
        else f"no base given (a.sdelta was made for {model_id}, which is no repository of the Hub)"
    )
    assert err == f"Error: {why}; write: deltakit merge BASE DELTA\n"


def test_in_place_needs_a_base(delta: dk.SparseDelta) -> None:
    code, _, err = run("merge", _saved(delta), "--in-place")
    assert code == 1
    assert "no base given, and --in-place changes one on this machine" in err


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
    """The last one, behind its header, which is read first and lies before the wrong half."""
    sha256 = published.repos["model", "org/base"].files("main")[SHARDS[2]].sha256
    getattr(published, fault)(f"GET /object/{sha256}", times=2)
    with pytest.raises(error, match="run the same command again"):
        dk.merge(None, delta, "out", keep_base=False)
    assert list(Path().iterdir()) == []
    assert (cached(), objects()) == ([], 0)
    dk.merge(None, delta, "out", keep_base=False)
    dk.merge(base, delta, "here")
    assert contents("out") == contents("here")


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
    code, out, err = run("verify", _saved(delta), "--recorded-base")
    assert (code, err) == (0, f"Note: the base is {at}, as a.sdelta records\n")
    assert out.startswith(f"a.sdelta: sound, and {at} is its base; 60 entries")
    published.add(
        "org/base", {SHARDS[0]: (write_base(base.parent / "b", 9) / SHARDS[0]).read_bytes()}
    )
    moved = replace(delta, base=replace(delta.base, revision=commit_of(published)))
    code, _, err = run("verify", _saved(moved), "--recorded-base")
    assert code == 1
    assert "tensor 'w0' has other values" in err
    code, _, err = run("verify", _saved(delta_of(base, None, "base")), "--recorded-base")
    assert (code, err.count("\n")) == (1, 1)
    assert err.endswith("no repository of the Hub); write: deltakit verify DELTA --base BASE\n")
    code, _, err = run("verify", "a.sdelta", "--recorded-base", "--base", base)
    assert code == 2
    assert "give one" in err
