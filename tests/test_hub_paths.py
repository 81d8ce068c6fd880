"""`hf://` wherever a base or a delta goes, in Python and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import write_sharded
from click.testing import CliRunner
from hub_server import HubServer

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import ConfigError, HubNotFoundError, HubUnavailableError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import is_sdelta

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that holds nothing."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def published(hub: HubServer, checkpoint: Checkpoint, delta_file: Path) -> HubServer:
    """A Hub with `org/base` (the checkpoint and more) and `org/news` (its delta)."""
    base = {
        "model.safetensors": checkpoint.path.read_bytes(),
        "pytorch_model.bin": b"PK\x03\x04",
        "consolidated.safetensors": b"all of it again",
        "config.json": b'{"model_type": "bert"}',
        "tokenizer.model": b"words",
        "training.log": b"much",
    }
    hub.add("org/base", base)
    hub.add("org/news", {"delta.sdelta": delta_file.read_bytes(), "README.md": b"# news"})
    return hub


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_delta_is_loaded_by_its_repository(published: HubServer, delta_file: Path) -> None:
    local = dk.load(delta_file)
    assert dk.load("hf://org/news").equals(local)
    assert dk.load(Path("hf://org/news/delta.sdelta")).equals(local)
    assert is_sdelta("hf://org/news")
    assert not is_sdelta("hf://org/gone")


def test_only_what_is_needed_is_downloaded(published: HubServer) -> None:
    base = Checkpoint("hf://org/base")
    assert base.directory is not None
    found = sorted(path.name for path in base.directory.iterdir())
    assert found == ["config.json", "model.safetensors", "tokenizer.model"]
    assert base.config() == {"model_type": "bert"}


def test_a_base_knows_where_it_came_from(published: HubServer, checkpoint: Checkpoint) -> None:
    base = Checkpoint("hf://org/base@main")
    commit = published.repos["model", "org/base"].refs["main"]
    assert (base.model_id, base.revision) == ("org/base", commit)
    assert base.words("w").tobytes() == checkpoint.words("w").tobytes()
    delta = dk.diff("hf://org/base", "hf://org/base")
    assert delta.base is not None
    assert (delta.base.model_id, delta.base.revision) == ("org/base", commit)


def test_shards_come_with_their_index_alone(hub: HubServer, tmp_path: Path) -> None:
    tensors = [{"a": np.arange(6, dtype=np.float32)}, {"b": np.ones((2, 2), np.float16)}]
    local = write_sharded(tmp_path / "local", list(tensors), {"model_type": "bert"})
    files = {f"deep/{p.name}": p.read_bytes() for p in local.iterdir()}
    hub.add("org/base", {**files, "deep/unused.safetensors": b"x", "top.json": b"{}"})
    for place in ("hf://org/base/deep", "hf://org/base/deep/model.safetensors.index.json"):
        base = Checkpoint(place)
        assert base.names == ["a", "b"]
        assert base.words("a").tobytes() == tensors[0]["a"].tobytes()
        assert not (base.files[0].parent / "unused.safetensors").exists()
        assert not (base.files[0].parents[1] / "top.json").exists()
    assert Checkpoint("hf://org/base/deep/" + base.files[0].name).names == ["a"]


def test_merging_from_the_hub_gives_the_bits_of_merging_here(
    published: HubServer, checkpoint: Checkpoint, delta_file: Path
) -> None:
    dk.merge(checkpoint.path, delta_file, "here.safetensors")
    report = dk.merge("hf://org/base", ["hf://org/news"], "there")
    assert Path("there/model.safetensors").read_bytes() == Path("here.safetensors").read_bytes()
    assert report.deltas == ("hf://org/news",)
    assert not Path("there/model.safetensors").is_symlink()
    assert json.loads(Path("there/config.json").read_text()) == {"model_type": "bert"}


def test_merged_names_stand_in_the_working_directory(published: HubServer) -> None:
    code, out, err = run("merge", "hf://org/news", "hf://org/base")
    assert (code, err) == (0, "")
    assert "base-news: " in out
    assert Path("base-news/model.safetensors").is_file()
    code, out, _ = run("merge", "hf://org/base/model.safetensors", "hf://org/news")
    assert (code, out.partition(":")[0]) == (0, "model-news.safetensors")
    assert sorted(path.name for path in Path().iterdir()) == ["base-news", "model-news.safetensors"]


def test_merging_in_place_is_for_local_bases(published: HubServer) -> None:
    for base in ("hf://org/base", "hf://org/base/model.safetensors"):
        code, _, err = run("merge", base, "hf://org/news", "--in-place")
        assert code == 1
        assert err.startswith(
            f"Error: {base} is on the Hub, and files in the cache are not changed"
        )
        assert "hf download org/base --local-dir DIR" in err
    with pytest.raises(ConfigError, match="not changed in place"):
        dk.revert("hf://org/base")


def test_a_local_base_takes_a_delta_of_the_hub_in_place(
    published: HubServer, checkpoint: Checkpoint, delta_file: Path
) -> None:
    dk.merge(checkpoint.path, delta_file, "here.safetensors")
    dk.merge_in_place(checkpoint.path, "hf://org/news")
    assert checkpoint.path.read_bytes() == Path("here.safetensors").read_bytes()


def test_truncating_writes_here(published: HubServer, delta_file: Path) -> None:
    code, out, err = run("truncate", "hf://org/news", "--budget", "25")
    assert (code, err) == (0, "")
    assert out.startswith("news-25.sdelta: 25 of 110 entries")
    assert dk.load("news-25.sdelta").equals(dk.truncate(dk.load(delta_file), 25))
    code, _, err = run("truncate", "hf://org/news/delta.sdelta", "-b", "9", "-o", "hf://org/x")
    assert code == 2
    assert "hf://org/x is on the Hub, and a local path is needed here" in err


def test_the_other_commands_take_locations(published: HubServer, delta_file: Path) -> None:
    code, out, err = run("verify", "hf://org/news", "--base", "hf://org/base")
    assert (code, err) == (0, "")
    assert out.startswith("hf://org/news: sound, and hf://org/base is its base; 110 entries")
    code, out, _ = run("compare", "hf://org/news", delta_file, "--json")
    told = json.loads(out)
    assert code == 0
    assert [d["label"] for d in told["deltas"]] == ["hf://org/news", str(delta_file)]
    code, out, _ = run("diff", "hf://org/base", "hf://org/base", "-o", "none.sdelta")
    assert (code, out.partition(" entries")[0]) == (0, "none.sdelta: 0")
    both = dk.stack(["hf://org/news", delta_file], "linear", [0.5, 0.5], base="hf://org/base")
    here = dk.stack([delta_file, delta_file], "linear", [0.5, 0.5])
    assert [s["name"] for s in both.provenance["sources"]] == ["news.sdelta", "delta.sdelta"]
    for name in here.tensors:
        assert both.tensors[name].values.tobytes() == here.tensors[name].values.tobytes()


def test_stacks_and_conversions_are_named_here(published: HubServer, delta_file: Path) -> None:
    code, out, err = run("stack", "hf://org/news", delta_file, "--base", "hf://org/base")
    assert (code, err) == (0, "")
    assert out.startswith("news-linear.sdelta: 110 entries in 2 tensors of 2 deltas")
    source = "hf://org/news/delta.sdelta"
    code, _, _ = run("convert", source, "coo", "--to", "coo-safetensors", "--base", "hf://org/base")
    assert code == 0
    code, _, _ = run("convert", "coo", "back.sdelta", "--mode", "add", "--base", "hf://org/base")
    assert code == 0
    assert dk.load("back.sdelta").nnz == 110


def test_inspecting_downloads_the_header_alone(published: HubServer, delta_file: Path) -> None:
    found = dk.inspect("hf://org/news")
    assert found.remote
    assert found.header == dk.inspect(delta_file).header
    assert found.file_bytes == delta_file.stat().st_size
    assert found.as_dict()["changes"] is None
    ranges = [each for each in published.seen if each.call.startswith("GET /object/")]
    assert [each.range for each in ranges] == ["bytes=0-65535"]
    assert not list(Path("..").rglob("delta.sdelta.*"))
    code, out, err = run("inspect", "hf://org/news", "--tensors")
    assert (code, err) == (0, "")
    assert "changes  not read, as the values are on the Hub" in out
    dk.load("hf://org/news")
    known = dk.inspect("hf://org/news")
    assert not known.remote
    assert known.as_dict()["changes"] == dk.inspect(delta_file).as_dict()["changes"]


def test_a_long_header_takes_one_more_range(
    published: HubServer, delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltakit.hub.remote_delta.PREFIX", 100)
    assert dk.inspect("hf://org/news").entries == 110
    ranges = [each for each in published.seen if each.call.startswith("GET /object/")]
    assert ranges[0].range == "bytes=0-99"
    assert len(ranges) == 2
    assert sum(each.sent for each in ranges) < delta_file.stat().st_size


def test_a_remote_header_tells_its_changes_when_asked(published: HubServer) -> None:
    found = dk.inspect("hf://org/news")
    assert set(found.changes) == {"b", "w"}  # downloads it
    assert not dk.inspect("hf://org/news").remote


@pytest.mark.parametrize("revision", ["v1", "refs%2Fpr%2F1", "refs/pr/1", "COMMIT"])
def test_revisions(published: HubServer, delta_file: Path, revision: str) -> None:
    repo = published.repos["model", "org/news"]
    old = dk.load(delta_file)
    repo.tag("v1")
    published.add("org/news", {"delta.sdelta": delta_file.read_bytes()}, revision="refs/pr/1")
    commit = repo.refs["main"]
    dk.save(dk.truncate(old, 5), "new.sdelta")
    published.add("org/news", {"delta.sdelta": Path("new.sdelta").read_bytes()})
    assert dk.load("hf://org/news").nnz == 5
    assert dk.load(f"hf://org/news@{revision.replace('COMMIT', commit)}").equals(old)


def test_what_is_cached_is_not_asked_for_again(published: HubServer) -> None:
    dk.load("hf://org/news")
    before = len(published.seen)
    dk.load("hf://org/news")
    assert [each.call for each in published.seen[before:]] == ["GET /api/models/org/news"]
    commit = published.repos["model", "org/news"].refs["main"]
    before = len(published.seen)
    dk.load(f"hf://org/news@{commit}/delta.sdelta")
    assert len(published.seen) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.sdelta", "b.sdelta"], "holds a.sdelta, b.sdelta; name one, such as hf://org/d/a.sd"),
        (["config.json"], "org/d has no .sdelta file"),
        ([], "org/d has no .sdelta file"),
    ],
)
def test_which_delta_is_meant(hub: HubServer, files: list[str], message: str) -> None:
    hub.add("org/d", dict.fromkeys(files, b"x"))
    with pytest.raises((ConfigError, HubNotFoundError), match=message):
        dk.load("hf://org/d")


def test_the_usual_name_wins_and_the_only_one_is_found(hub: HubServer, delta_file: Path) -> None:
    data = delta_file.read_bytes()
    hub.add("org/run", {"delta.sdelta": data, "budget-50.sdelta": b"x", "best.sdelta": b"x"})
    hub.add("org/one", {"deep/only.sdelta": data})
    assert dk.load("hf://org/run").nnz == 110
    assert dk.load("hf://org/one").nnz == 110
    assert dk.load("hf://org/one/deep").nnz == 110


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.safetensors", "b.safetensors"], "holds a.safetensors, b.safetensors; name one"),
        (["pytorch_model.bin"], "only pickles, which deltakit never reads"),
        (["delta.sdelta"], "no .safetensors file; it holds a delta"),
        (["model.safetensors.index.json"], "is no index of weight files"),
    ],
)
def test_which_base_is_meant(hub: HubServer, files: list[str], message: str) -> None:
    hub.add("org/b", dict.fromkeys(files, b"x"))
    with pytest.raises((ConfigError, HubNotFoundError, ValueError), match=message):
        Checkpoint("hf://org/b")


def test_pickles_are_never_downloaded(published: HubServer) -> None:
    with pytest.raises(ConfigError, match=r"a base is a .safetensors file, an index or a folder"):
        Checkpoint("hf://org/base/pytorch_model.bin")
    Checkpoint("hf://org/base")
    assert not published.calls("pytorch_model")


def test_a_file_that_is_not_there_is_told_with_the_nearest(published: HubServer) -> None:
    with pytest.raises(MissingFileError, match=r"'delta2.sdelta'; nearest: delta.sdelta"):
        dk.load("hf://org/news/delta2.sdelta")


def test_a_repository_of_both_kinds_must_be_told_apart(published: HubServer) -> None:
    published.add("org/base", {"x.sdelta": b"x"})
    code, _, err = run("merge", "hf://org/base", "hf://org/news")
    assert code == 1
    assert "name one, such as hf://org/base/x.sdelta" in err


def test_offline_mode_takes_the_cache_and_says_what_it_lacks(
    published: HubServer, monkeypatch: pytest.MonkeyPatch, delta_file: Path
) -> None:
    dk.load("hf://org/news")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(published.seen)
    assert dk.load("hf://org/news").equals(dk.load(delta_file))
    assert dk.inspect("hf://org/news").entries == 110
    with pytest.raises(HubUnavailableError, match=r"offline mode is on \(HF_HUB_OFFLINE\)"):
        Checkpoint("hf://org/base")
    with pytest.raises(HubUnavailableError, match="lacks some file of it; run once without it"):
        Checkpoint("hf://org/news")
    assert len(published.seen) == before


@pytest.mark.parametrize("quiet", [False, True])
def test_a_stale_cache_is_told_unless_quiet(published: HubServer, quiet: bool) -> None:
    dk.load("hf://org/news")
    published.fail("GET /api/models/org/news", 503)
    code, _, err = run("truncate", "hf://org/news", "-b", "9", *(["--quiet"] if quiet else []))
    assert code == 0
    assert ("" if quiet else "from the cache is used\n") == err[-len("from the cache is used\n") :]


def test_the_environment_is_honoured(published: HubServer, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, in a process of its own; then HF_HUB_OFFLINE."""
    published.repos["model", "org/news"].private = True
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": published.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_org",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "deltakit", "truncate", "hf://org/news", "-b", "9", "--force"],
            env={**env, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("news-9.sdelta: 9 of 110 entries")
        stored = [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
        assert any("snapshots" in p.parts for p in stored)
        assert not any(b"hf_org" in p.read_bytes() for p in stored)
