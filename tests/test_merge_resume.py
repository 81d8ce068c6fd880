"""Laws of merging folders shard by shard: killed merges are gone on with, workers agree."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import random_array, write_sharded

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import FormatError, OutputError
from deltakit.formats import sdelta
from deltakit.formats.partial_folder import resuming_folder
from deltakit.merging.merge import merge

SHAPE = (300, 1000)
NAMES = "abcd"
KILLED = """
import os, signal, sys
from deltakit.merging.merge import merge
base, delta, out = sys.argv[1:]
def kill(done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
merge(base, delta, out, workers=1, progress=kill)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    shards = [{name: random_array(rng, SHAPE, np.dtype(np.float32))} for name in NAMES]
    return write_sharded(tmp_path / "base", shards, {"a": 1})


def delta_file(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in NAMES:
        indices = np.unique(rng.integers(0, SHAPE[0] * SHAPE[1], 500))
        values = rng.standard_normal(len(indices))
        tensors[name] = TensorDelta(
            name=name, shape=SHAPE, dtype="float32", mode="add", indices=indices, values=values
        )
    sdelta.save(SparseDelta(tensors=tensors), path)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed(base: Path, delta: Path, out: Path) -> Path:
    """Kill a merge within its third weight file of four; the partial folder it leaves."""
    done = subprocess.run([sys.executable, "-c", KILLED, base, delta, out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = out.parent.glob(f".{out.name}.*.partial")
    return partial


def test_a_killed_merge_is_gone_on_with(tmp_path: Path, base: Path) -> None:
    """Whole files are kept as they are, inode and all; the result is that of one merge."""
    delta, out = delta_file(tmp_path / "d.sdelta", 2), tmp_path / "out"
    merge(base, delta, tmp_path / "expected")
    partial = killed(base, delta, out)
    kept = {path.name: path.stat().st_ino for path in partial.glob("model-*.safetensors")}
    assert len(kept) == 2
    report = merge(base, delta, out)
    assert "2 weight files were finished by an earlier merge" in report.notes
    assert files_of(out) == files_of(tmp_path / "expected")
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("change", ["delta", "weight", "base", "dtype"])
def test_other_inputs_start_anew(tmp_path: Path, base: Path, change: str) -> None:
    """Nothing of a killed merge is used for another one, and it is cleared away."""
    delta, out = delta_file(tmp_path / "d.sdelta", 2), tmp_path / "out"
    killed(base, delta, out)
    options = {"weight": {"weights": [0.5]}, "dtype": {"dtype": "float16"}}.get(change, {})
    if change == "delta":
        delta = delta_file(tmp_path / "e.sdelta", 3)
    if change == "base":
        shard = base / "model-00001-of-00004.safetensors"
        data = shard.read_bytes()
        shard.write_bytes(data[:-4] + data[-8:-4])
    report = merge(base, delta, out, **options)
    assert not any("earlier merge" in note for note in report.notes)
    merge(base, delta, tmp_path / "expected", **options)
    assert files_of(out) == files_of(tmp_path / "expected")
    assert not list(tmp_path.glob(".out.*"))


def test_workers_write_the_same_bytes(tmp_path: Path, base: Path) -> None:
    delta = delta_file(tmp_path / "d.sdelta", 2)
    seen: list[tuple[int, int]] = []
    for workers in (1, 3):
        merge(
            base,
            delta,
            tmp_path / str(workers),
            workers=workers,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    assert seen[-1][0] == seen[-1][1]


def test_the_error_of_one_worker_ends_all(tmp_path: Path, base: Path) -> None:
    """A shard that is cut short while the merge runs is told, and nothing is left behind."""
    delta = delta_file(tmp_path / "d.sdelta", 2)
    shard = base / "model-00003-of-00004.safetensors"

    def cut(done: int, total: int) -> None:
        with shard.open("rb+") as file:
            file.truncate(5000)

    with pytest.raises(FormatError, match=r"00003-of-00004\.safetensors became shorter"):
        merge(base, delta, tmp_path / "out", workers=2, progress=cut)
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".out*"))


def test_two_writers_of_one_folder_are_told(tmp_path: Path, base: Path) -> None:
    delta = delta_file(tmp_path / "d.sdelta", 2)
    with resuming_folder(tmp_path / "out", "0123456789abcdef") as partial:
        (partial / "x").write_text("mine")
        with pytest.raises(OutputError, match=r"another process is writing .*out; wait for it"):
            merge(base, delta, tmp_path / "out")
        assert (partial / "x").read_text() == "mine"
    assert (tmp_path / "out" / "x").read_text() == "mine"
