"""Laws of diff by the jobs of a job array and by several workers: the file that one diff writes."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_lab import arrays, ended, files_of, make_base, start

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import ConfigError, DeltaError, OutputExistsError
from deltakit.formats.checkpoint import Checkpoint


def make_tuned(folder: Path, seed: int = 4) -> Path:
    """The base of `make_base` with changes in most tensors, a new head, and rows appended; in other
    files than there."""
    rng = np.random.default_rng(seed)
    tensors = {name: array.copy() for held in arrays() for name, array in held.items()}
    for name, array in tensors.items():
        if name != "w.2":
            flat = array.reshape(-1)
            flat[rng.choice(flat.size, 25, replace=False)] += 0.25
    tensors["w.1"] = np.concatenate([tensors["w.1"], np.ones((2, 11), np.float32)])
    tensors["a.new"] = np.ones(5, np.float32)
    names = sorted(tensors)
    return make_base(folder, [{n: tensors[n] for n in names[k::3]} for k in range(3)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return make_tuned(tmp_path / "tuned")


def parts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".part-" in path.name)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"mode": "add"},
    {"keep_base": False},
    {"budget": 60},
    {"budget": 60, "mode": "add", "keep_base": False},
    {"budget": "1%"},
    {"density": 0},
]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), jobs=st.integers(1, 14), options=st.sampled_from(OPTIONS))
def test_jobs_in_any_order_write_what_one_diff_writes(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    jobs: int,
    options: dict[str, Any],
) -> None:
    """Ties at the budget included: all changes are equal."""
    folder = tmp_path_factory.mktemp("array")
    base, tuned = make_base(folder / "base"), make_tuned(folder / "tuned")
    plain = dk.diff(base, tuned, out=folder / "plain.sdelta", **options)
    order = data.draw(st.permutations(range(1, jobs + 1)))
    out = folder / "out.sdelta"
    reports = [dk.diff(base, tuned, out=out, shard=(n, jobs), **options) for n in order]
    assert out.read_bytes() == (folder / "plain.sdelta").read_bytes()
    assert parts_of(folder) == []
    shares = [report.share for report in reports]
    assert [share.published for share in shares if share] == [False] * (jobs - 1) + [True]
    last = {**reports[-1].as_dict(), "output": plain.output, "share": None}
    assert last == plain.as_dict()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_workers_write_the_same_bytes(
    tmp_path: Path, base: Path, tuned: Path, options: dict[str, Any]
) -> None:
    seen: list[tuple[int, int]] = []
    for workers in (1, 4):
        dk.diff(
            base,
            tuned,
            out=tmp_path / f"{workers}.sdelta",
            workers=workers,
            progress=lambda done, total: seen.append((done, total)),
            **options,
        )
    assert files_of(tmp_path / "1.sdelta") == files_of(tmp_path / "4.sdelta")
    assert seen == seen[: len(seen) // 2] * 2
    assert seen[-1][0] == seen[-1][1]
    assert dk.diff(base, tuned, workers=3, **options).equals(dk.load(tmp_path / "1.sdelta"))


def test_a_part_is_a_delta_and_a_job_that_runs_again_does_nothing(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    out = tmp_path / "out.sdelta"
    first = dk.diff(base, tuned, out=out, shard="1/2")
    assert first.output == str(tmp_path / "out.part-00001-of-00002.sdelta")
    assert first.share is not None
    assert first.share.missing == ("out.part-00002-of-00002.sdelta",)
    assert dk.verify(first.output, base).ok
    whole = dk.diff(base, tuned)
    part = dk.load(first.output)
    assert all(tensor.equals(whole.tensors[name]) for name, tensor in part.tensors.items())
    state = Path(first.output).stat()
    again = dk.diff(base, tuned, out=out, shard="1/2")
    assert again.share is not None
    assert (again.share.written, again.share.found) == ((), first.share.written)
    assert again.entries == first.entries == part.nnz
    assert Path(first.output).stat() == state
    dk.diff(base, tuned, out=out, shard="2/2")
    state = out.stat()
    for number in (1, 2):
        report = dk.diff(base, tuned, out=out, shard=(number, 2), force=False)
        assert report.share is not None
        assert (report.share.missing, report.share.published) == ((), False)
        assert report.entries == whole.nnz
    assert out.stat() == state
    assert parts_of(tmp_path) == []
    with pytest.raises(OutputExistsError):
        dk.diff(base, tuned, out=out, shard="1/2", mode="add", force=False)


@pytest.mark.parametrize("change", ["tuned", "base", "mode", "budget"])
def test_parts_of_other_inputs_are_never_joined(
    tmp_path: Path, base: Path, tuned: Path, change: str
) -> None:
    """They are replaced by those of the jobs that run now."""
    out = tmp_path / "out.sdelta"
    dk.diff(base, tuned, out=out, shard="1/2")
    options = {"mode": {"mode": "add"}, "budget": {"budget": 9}}.get(change, {})
    if change == "tuned":
        tuned = make_tuned(tmp_path / "other", seed=5)
    if change == "base":
        next(base.glob("*.safetensors")).touch()
    second = dk.diff(base, tuned, out=out, shard="2/2", **options)
    assert second.share is not None
    assert second.share.missing == ("out.part-00001-of-00002.sdelta",)
    assert not out.exists()
    dk.diff(base, tuned, out=out, shard="1/2", **options)
    dk.diff(base, tuned, out=tmp_path / "plain.sdelta", **options)
    assert files_of(out) == files_of(tmp_path / "plain.sdelta")


def test_a_part_that_is_damaged_is_not_joined(tmp_path: Path, base: Path, tuned: Path) -> None:
    """Its header at once; its streams when they are read, and nothing is there then."""
    out = tmp_path / "out.sdelta"
    part = Path(dk.diff(base, tuned, out=out, shard="1/2").output)
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(dk.errors.ChecksumError, match="part-00001-of-00002"):
        dk.diff(base, tuned, out=out, shard="2/2")
    assert not out.exists()
    part.write_bytes(whole[:100])
    assert dk.diff(base, tuned, out=out, shard="1/2").share
    assert out.exists()


def test_jobs_killed_at_any_file_operation(tmp_path: Path, base: Path, tuned: Path) -> None:
    dk.diff(base, tuned, out=tmp_path / "plain.sdelta")
    out = tmp_path / "out.sdelta"
    chance, killed = random.Random(6), 0
    for number in (1, 2):
        for _ in range(4):
            dies = chance.randrange(0, 5)
            job = start("diff", base, tuned, dies=dies, out=str(out), shard=f"{number}/2")
            killed += ended(job) is None
            if out.exists():
                assert files_of(out) == files_of(tmp_path / "plain.sdelta")
        dk.diff(base, tuned, out=out, shard=(number, 2))
    assert killed >= 3
    assert files_of(out) == files_of(tmp_path / "plain.sdelta")
    assert parts_of(tmp_path) == []


def test_jobs_at_the_same_time_join_once(tmp_path: Path, base: Path, tuned: Path) -> None:
    dk.diff(base, tuned, out=tmp_path / "plain.sdelta")
    out = tmp_path / "out.sdelta"
    jobs = [start("diff", base, tuned, out=str(out), shard=f"{n}/3") for n in (1, 2, 3, 3)]
    reports = [ended(job) for job in jobs]
    assert sum(report["share"]["published"] for report in reports if report) == 1
    assert files_of(out) == files_of(tmp_path / "plain.sdelta")
    assert parts_of(tmp_path) == []


def test_memory_does_not_grow_with_workers_times_tensors(tmp_path: Path) -> None:
    """24 tensors by two workers take about what four take."""

    def peak(count: int) -> int:
        rng = np.random.default_rng(2)
        folder = tmp_path / str(count)
        folder.mkdir(exist_ok=True)
        for side in ("base", "tuned"):
            array = random_array(rng, (50_000,), np.float32)
            write_safetensors(folder / side, {f"t{n}": array for n in range(count)})
        tracemalloc.start()
        dk.diff(folder / "base", folder / "tuned", out=folder / "o.sdelta", workers=2)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)  # imports
    assert peak(24) < 1.5 * peak(4)


def test_an_error_of_one_worker_ends_the_diff(tmp_path: Path, base: Path) -> None:
    odd = [{"q": np.zeros(4, np.float32)}]
    paths = [write_safetensors(tmp_path / name, odd[0]) for name in ("a", "b")]
    for number, path in enumerate(paths):
        data = path.read_bytes().replace(b'"F32"', b'"E32"')
        path.write_bytes(data[:-1] + bytes([number]))
    with pytest.raises(DeltaError, match="tensor 'q' differs, and its dtype E32 is not supported"):
        dk.diff(*paths, out=tmp_path / "o.sdelta", workers=4)
    assert not (tmp_path / "o.sdelta").exists()


def test_the_command(tmp_path: Path, base: Path, tuned: Path) -> None:
    out = tmp_path / "out.sdelta"

    def run(*more: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(main, ["diff", str(base), str(tuned), "-o", str(out), *more])
        return done.exit_code, done.stdout, done.stderr

    code, _, err = run("--shard", "9/8")
    assert (code, "Invalid value for '--shard'" in err) == (2, True)
    code, told, _ = run("--shard", "1/2", "--workers", "2")
    assert code == 0
    assert f"{out}: shard 1/2: written 1 of 2 files; 1 still to come from other shards\n" in told
    code, told, _ = run("--shard", "2/2", "--json")
    assert (code, json.loads(told)["share"]["published"]) == (0, True)
    code, told, _ = run("--shard", "2/2")
    assert (code, "1 finished before; complete\n" in told) == (0, True)
    code, _, err = run("--shard", "2/2", "--mode", "add")
    assert (code, "exists; give another output or --force" in err) == (1, True)
    assert run("--shard", "2/2", "--mode", "add", "--force")[0] == 0
    with pytest.raises(ConfigError, match=r"writes a part beside its output; give out \(-o\)"):
        dk.diff(base, tuned, shard="1/2")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="out, progress and shard are for diffs of files"):
        dk.diff({}, {}, shard="1/2")  # type: ignore[call-overload]


def test_a_job_without_a_share_joins_like_any_other(tmp_path: Path) -> None:
    """More jobs than tensors, and an empty delta."""
    path = write_safetensors(tmp_path / "a.safetensors", {"t": np.zeros(4, np.float32)})
    for number in (3, 1, 2):
        dk.diff(path, path, out=tmp_path / "o.sdelta", shard=(number, 3))
    assert dk.load(tmp_path / "o.sdelta").nnz == 0
    assert Checkpoint(path).total_weights == 4
