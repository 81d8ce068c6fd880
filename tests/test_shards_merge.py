"""Laws of merging by the jobs of a job array: any order, any end, one result."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_safetensors
from click.testing import CliRunner
from fold_lab import LORA, adapter_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_reference import adding, only
from shard_lab import SIZES, arrays, ended, files_of, make_base, make_delta, start

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import BaseMismatchError, ConfigError, OutputError, OutputExistsError
from deltakit.shares import Shard, in_order, runs

FILES = [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def delta(tmp_path: Path, base: Path) -> Path:
    return make_delta(tmp_path / "d.sdelta", base)


def leftovers(folder: Path) -> list[str]:
    """Hidden things in a folder but for marks."""
    return [path.name for path in folder.glob(".*") if path.suffix != ".done"]


@given(sizes=st.lists(st.integers(0, 1000), max_size=30), jobs=st.integers(1, 40))
def test_shares_are_runs_of_nearly_equal_size(sizes: list[int], jobs: int) -> None:
    """Every item once and in order; none idle while there are items; balanced up to one item."""
    numbered = list(enumerate(sizes))
    found = runs(numbered, lambda item: item[1], jobs)
    assert len(found) == jobs
    assert [item for run in found for item in run] == numbered
    assert all(found) or len(sizes) < jobs
    weights = [max(1, size) for size in sizes]
    for run in found:
        load = sum(weights[number] for number, _ in run)
        assert load * jobs <= sum(weights) + max(weights, default=0) * jobs
    for number, run in enumerate(found, 1):
        assert Shard(number, jobs).of(numbered, lambda item: item[1]) == run


def test_what_is_no_shard() -> None:
    assert Shard.parse("3/8") == Shard.parse((3, 8)) == Shard(3, 8)
    for bad in ("9/8", "0/4", "x", "1", "1/0", "-1/3", "1/2/3", (0, 2), (1, 2, 3), "1/\uff12"):
        with pytest.raises(ConfigError, match=r"^shard .* is no"):
            Shard.parse(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_few_at_a_time(workers: int) -> None:
    begun: list[int] = []
    taken = 0
    for found in in_order(lambda n: begun.append(n) or n * n, range(20), workers):
        assert found == taken * taken
        assert len(begun) - taken <= workers
        taken += 1
    assert taken == 20
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (n - 3), range(1000), workers))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights": [0.5, 2.0]},
    {"dtype": "bfloat16"},
    {"dtype": "trained"},
    {"method": "ties", "density": 0.5},
]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), jobs=st.integers(1, 8), options=st.sampled_from(OPTIONS))
def test_jobs_in_any_order_write_what_one_merge_writes(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    jobs: int,
    options: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("array")
    base = make_base(folder / "base")
    deltas = [make_delta(folder / f"{seed}.sdelta", base, seed) for seed in (1, 2)]
    dk.merge(base, deltas, folder / "plain", **options)
    order = data.draw(st.permutations(range(1, jobs + 1)))
    reports = [dk.merge(base, deltas, folder / "out", shard=(n, jobs), **options) for n in order]
    assert files_of(folder / "out") == files_of(folder / "plain")
    shares = [report.share for report in reports]
    assert sum(share.published for share in shares if share) == 1
    assert sorted(name for share in shares if share for name in share.written) == FILES
    assert leftovers(folder) == []


def test_a_job_that_runs_again_does_nothing(tmp_path: Path, base: Path, delta: Path) -> None:
    """Before the folder is in its place, and after."""
    out = tmp_path / "out"
    first = dk.merge(base, delta, out, shard="2/3").share
    assert first is not None
    assert (first.shard, first.files, first.found) == ("2/3", 5, ())
    assert set(first.missing) == set(FILES) - set(first.written)
    assert re.fullmatch(
        r"shard 2/3: written \d of 5 files; \d still to come from other shards", str(first)
    )
    (partial,) = tmp_path.glob(".out.*.partial")
    before = {path: path.stat() for path in partial.iterdir()}
    again = dk.merge(base, delta, out, shard="2/3").share
    assert again is not None
    assert (again.written, again.found) == ((), first.written)
    assert {path: path.stat() for path in partial.iterdir()} == before
    for number in (1, 3):
        dk.merge(base, delta, out, shard=(number, 3))
    before = {path: path.stat() for path in [out, *out.iterdir()]}
    for number in (1, 2, 3):
        report = dk.merge(base, delta, out, shard=(number, 3), force=number == 2)
        assert report.share is not None
        assert (report.share.written, report.share.missing) == ((), ())
        assert not report.share.published
    assert {path: path.stat() for path in [out, *out.iterdir()]} == before
    with pytest.raises(OutputExistsError):  # other work than what is there
        dk.merge(base, delta, out, shard="1/3", weights=[0.5])
    assert leftovers(tmp_path) == []


def test_one_merge_goes_on_where_jobs_stopped(tmp_path: Path, base: Path, delta: Path) -> None:
    dk.merge(base, delta, tmp_path / "plain")
    share = dk.merge(base, delta, tmp_path / "out", shard="1/2").share
    assert share is not None
    (partial,) = tmp_path.glob(".out.*.partial")
    (partial / f".{FILES[4]}.abc.deltakit.tmp").write_text("of a killed job")
    report = dk.merge(base, delta, tmp_path / "out")
    assert f"{len(share.written)} weight files were finished by an earlier merge" in report.notes
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == []


def test_what_jobs_finished_outlives_a_merge_that_is_interrupted(
    tmp_path: Path, base: Path, delta: Path
) -> None:
    dk.merge(base, delta, tmp_path / "out", shard="1/2")
    (partial,) = tmp_path.glob(".out.*.partial")
    before = files_of(partial)

    def interrupt(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    for how in ({"shard": "2/2"}, {}):
        with pytest.raises(KeyboardInterrupt):
            dk.merge(base, delta, tmp_path / "out", progress=interrupt, workers=1, **how)
        assert before.items() <= files_of(partial).items()
        assert not [path for path in partial.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("change", ["delta", "weight", "base", "dtype"])
def test_other_inputs_never_mix(tmp_path: Path, base: Path, delta: Path, change: str) -> None:
    dk.merge(base, delta, tmp_path / "out", shard="1/2")
    options = {"weight": {"weights": [0.5]}, "dtype": {"dtype": "float16"}}.get(change, {})
    if change == "delta":
        delta = make_delta(tmp_path / "d.sdelta", base, seed=7)
    if change == "base":
        (base / FILES[0]).touch()
    with pytest.raises(OutputError, match=r"\.partial holds a part of out made of other inputs or"):
        dk.merge(base, delta, tmp_path / "out", shard="2/2", **options)
    dk.merge(base, delta, tmp_path / "out", **options)  # one merge starts anew
    dk.merge(base, delta, tmp_path / "plain", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == []


def test_a_delta_that_is_replaced_meanwhile_is_noticed(
    tmp_path: Path, base: Path, delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its header and its entries."""
    from deltakit.merging import share as module

    def replaced(*given: Any) -> Any:
        make_delta(delta, base, seed=8)
        return again(*given)

    again = module.read_again
    monkeypatch.setattr(module, "read_again", replaced)
    with pytest.raises(dk.errors.DeltaError, match="was replaced by another delta meanwhile"):
        dk.merge(base, delta, tmp_path / "out", shard="1/2")


def test_jobs_killed_at_any_file_operation(tmp_path: Path, base: Path, delta: Path) -> None:
    """Killed and run again until it ends by itself, for jobs in turn; at random operations."""
    dk.merge(base, delta, tmp_path / "plain")
    chance, killed = random.Random(5), 0
    out = tmp_path / "out"
    for number in (2, 1):
        for _ in range(4):
            dies = chance.randrange(0, 8)
            done = ended(start("merge", base, delta, out, dies=dies, shard=f"{number}/2"))
            killed += done is None
            if out.exists():
                assert files_of(out) == files_of(tmp_path / "plain")
        dk.merge(base, delta, out, shard=(number, 2))
    assert killed >= 3
    assert files_of(out) == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == []


def test_jobs_at_the_same_time_publish_once(tmp_path: Path, base: Path, delta: Path) -> None:
    """Four processes, of which two do the same share and one has none."""
    dk.merge(base, delta, tmp_path / "plain")
    jobs = [start("merge", base, delta, tmp_path / "out", shard=n) for n in ("1/3", "2/3", "3/3")]
    jobs.append(start("merge", base, delta, tmp_path / "out", shard="3/3"))
    reports = [ended(job) for job in jobs]
    assert sum(report["share"]["published"] for report in reports if report) == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("works", [True, False])
def test_without_locks_one_of_two_publishers_wins(
    tmp_path: Path, base: Path, delta: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """As on some network file systems; another job publishes while this one is about to."""
    from deltakit.formats import atomic, shared_folder

    for module in (shared_folder, atomic):
        monkeypatch.setattr(module, "try_lock", lambda *given, **named: None)
    dk.merge(base, delta, tmp_path / "plain")
    dk.merge(base, delta, tmp_path / "out", shard="1/2")
    inner = shared_folder.publish

    def quicker(*given: Any) -> None:
        monkeypatch.setattr(shared_folder, "publish", inner)
        if works:
            share = dk.merge(base, delta, tmp_path / "out", shard="2/2").share
            assert share is not None
            assert share.published
        inner(*given)

    monkeypatch.setattr(shared_folder, "publish", quicker)
    share = dk.merge(base, delta, tmp_path / "out", shard="2/2").share
    assert share is not None
    assert share.published is not works
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert leftovers(tmp_path) == []


def test_base_values_are_compared_in_a_jobs_own_files(tmp_path: Path, delta: Path) -> None:
    """One file of another base: its job alone says so, before it writes anything."""
    changed = arrays()
    changed[4] = arrays(9)[4]
    other = make_base(tmp_path / "other", changed)
    with pytest.raises(BaseMismatchError, match=r"tensor 'b\.4' has other values"):
        dk.merge(other, delta, tmp_path / "out", shard="5/5")
    assert leftovers(tmp_path) == []
    for number in range(1, 5):
        dk.merge(other, delta, tmp_path / "out", shard=(number, 5))
    with pytest.raises(BaseMismatchError, match=r"tensor 'b\.4' has other values"):
        dk.merge(other, delta, tmp_path / "out", shard="5/5")
    dk.merge(other, delta, tmp_path / "out", shard="5/5", allow_base_mismatch=True)
    dk.merge(other, delta, tmp_path / "plain", allow_base_mismatch=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_a_job_holds_the_entries_of_its_own_tensors(tmp_path: Path) -> None:
    """Eight files and half a million entries: a job of eight needs a fraction of what one of one
    does."""
    rng = np.random.default_rng(3)
    shape, count = (1000, 400), 60_000
    names = [f"t{n}" for n in range(8)]
    base = make_base(tmp_path / "base", [{name: np.zeros(shape, np.float32)} for name in names])
    tensors = {
        name: dk.TensorDelta(
            name=name,
            shape=shape,
            dtype="float32",
            mode="add",
            indices=np.sort(rng.choice(400_000, count, replace=False)),
            values=np.ones(count, np.float32),
        )
        for name in names
    }
    dk.save(dk.SparseDelta(tensors=tensors), tmp_path / "d.sdelta")
    entries = sum(tensor.indices.nbytes + tensor.values.nbytes for tensor in tensors.values())
    peaks = []
    for jobs in (1, 8):
        tracemalloc.start()
        dk.merge(base, tmp_path / "d.sdelta", tmp_path / str(jobs), shard=(1, jobs), workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] - peaks[1] > 0.8 * entries * 7 / 8


def test_what_shards_do_not_do(tmp_path: Path, base: Path, delta: Path) -> None:
    lone = write_safetensors(tmp_path / "lone.safetensors", arrays()[0])
    for source in (base, lone):
        with pytest.raises(ConfigError, match=r"is one \.safetensors file, and shards are shared"):
            dk.merge(source, delta, tmp_path / "o.safetensors", shard="1/2")
    with pytest.raises(ConfigError, match="requantize without --shard"):
        dk.merge(base, delta, tmp_path / "out", shard="1/2", requantize=True)


def test_the_command(tmp_path: Path, base: Path, delta: Path) -> None:
    def run(*more: str) -> tuple[int, str, str]:
        arguments = ["merge", str(base), str(delta), "-o", str(tmp_path / "out"), *more]
        done = CliRunner().invoke(main, arguments)
        return done.exit_code, done.stdout, done.stderr

    for bad in ("9/8", "0/4", "x"):
        code, _, err = run("--shard", bad)
        assert code == 2
        assert "Invalid value for '--shard': shard" in err
    done = CliRunner().invoke(
        main, ["merge", str(base), str(delta), "--in-place", "--shard", "1/2"]
    )
    assert (done.exit_code, "--shard does not go with --in-place" in done.stderr) == (2, True)
    code, out, err = run("--shard", "1/2", "--workers", "2")
    assert (code, err) == (0, "")
    assert re.fullmatch(r".*out: shard 1/2: written \d of 5 files; \d still to come .*\n", out)
    code, out, _ = run("--shard", "2/2", "--json")
    assert code == 0
    assert json.loads(out)["share"]["published"] is True
    code, out, _ = run("--shard", "2/2")
    assert (code, out.endswith("finished before; complete\n")) == (0, True)
    assert len(SIZES) == len(list((tmp_path / "out").glob("*.safetensors")))


def test_adapters_are_folded_by_jobs_too(tmp_path: Path) -> None:
    """Into their own files, together with a delta of weights and one that stays in memory."""
    rng = np.random.default_rng(5)
    shapes = {"a.weight": (10, 14), "b.weight": (6, 14), "c.bias": (10,)}
    shards = [{name: rng.normal(0, 1, shape).astype(np.float32)} for name, shape in shapes.items()]
    base = make_base(tmp_path / "base", shards)
    modules = {
        name: {"lora_A.weight": (4, 14), "lora_B.weight": (rows, 4)}
        for name, rows in (("a", 10), ("b", 6))
    }
    config = {**LORA, "fan_in_fan_out": False}
    dk.save(adapter_on(base, modules, config=config), tmp_path / "adapter.sdelta")
    dk.save(only(adding("b.weight", shards[1]["b.weight"], rng, 9)), tmp_path / "w.sdelta")
    given = [
        tmp_path / "adapter.sdelta",
        only(adding("a.weight", shards[0]["a.weight"], rng, 7)),
        tmp_path / "w.sdelta",
    ]
    dk.merge(base, given, tmp_path / "plain")
    for number in (2, 3, 1):
        dk.merge(base, given, tmp_path / "out", shard=(number, 3))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
