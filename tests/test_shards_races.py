"""Laws of jobs that meet: however they fall upon each other, one of them ends the work, and once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from shard_lab import files_of, make_base, make_delta
from test_shards_diff import make_tuned

import deltakit as dk
from deltakit.shares import ShareReport

ROUNDS = 8
Job = Callable[[Path, str], ShareReport | None]


def merging(folder: Path) -> Job:
    base = make_base(folder / "base")
    delta = make_delta(folder / "d.sdelta", base)
    dk.merge(base, delta, folder / "plain")
    return lambda out, shard: dk.merge(base, delta, out, shard=shard).share


def differing(folder: Path) -> Job:
    base, tuned = make_base(folder / "base"), make_tuned(folder / "tuned")
    dk.diff(base, tuned, out=folder / "plain")
    return lambda out, shard: dk.diff(base, tuned, out=out, shard=shard).share


@pytest.mark.parametrize("make", [merging, differing])
def test_jobs_that_begin_together_end_the_work_once(
    tmp_path: Path, make: Callable[[Path], Job]
) -> None:
    """One of them twice; threads hold locks of their own, as processes do."""
    job, out = make(tmp_path), tmp_path / "out"
    expected = files_of(tmp_path / "plain")
    for jobs in range(2, 2 + ROUNDS):
        barrier = Barrier(jobs + 1)

        def run(shard: str, barrier: Barrier = barrier) -> ShareReport | None:
            barrier.wait()
            return job(out, shard)

        with ThreadPoolExecutor(jobs + 1) as pool:
            shards = [f"{n}/{jobs}" for n in (*range(1, jobs + 1), 1)]
            reports = list(pool.map(run, shards))
        assert sum(report.published for report in reports if report) == 1
        assert files_of(out) == expected
        (shutil.rmtree if out.is_dir() else os.remove)(out)
        left = {path.name for path in tmp_path.iterdir() if path.suffix != ".done"}
        assert left <= {"base", "d.sdelta", "plain", "tuned"}


def test_workers_leave_permissions_as_they_are(tmp_path: Path) -> None:
    """Files are made ordinary by the process's umask, which is read by setting it."""
    base = make_base(tmp_path / "base")
    delta = make_delta(tmp_path / "d.sdelta", base)
    before = os.umask(0o026)
    try:
        for number in range(4):
            out = tmp_path / str(number)
            dk.merge(base, delta, out, workers=5)
            assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
        assert os.umask(0o026) == 0o026
    finally:
        os.umask(before)
