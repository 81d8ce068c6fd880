"""Laws of merging under faults: the target is whole or absent, the base and its folder untouched."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.merging.merge import merge

LOOP = """
import itertools, sys
from deltakit.formats import sdelta
from deltakit.merging.merge import merge
base, out, *files = sys.argv[1:]
deltas = [sdelta.load(file) for file in files]
for number in itertools.count():
    merge(base, deltas[number % 2], out, force=True)
    print("merged", flush=True)
"""
ONCE = """
import sys
from deltakit.errors import OutputError
from deltakit.merging.merge import merge
try:
    merge(*sys.argv[1:])
except OutputError as error:
    print(error)
"""
MEMORY = """
import re, sys
from pathlib import Path
from deltakit.merging.merge import merge
def peak():  # ru_maxrss would start from the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
merge(*sys.argv[1:])
print(peak() - before)
"""
SHAPE = (1500, 1000)


def delta_on(shape: tuple[int, ...], seed: int, count: int = 1000) -> SparseDelta:
    rng = np.random.default_rng(seed)
    indices = np.unique(rng.integers(0, int(np.prod(shape)), count))
    tensor = TensorDelta(
        name="w",
        shape=shape,
        dtype="bfloat16",
        mode="add",
        indices=indices,
        values=rng.standard_normal(len(indices)),
    )
    return SparseDelta(tensors={"w": tensor})


def make_base(folder: Path, is_folder: bool) -> Path:
    rng = np.random.default_rng(40)
    shards = [
        {"w": random_array(rng, SHAPE, ml_dtypes.bfloat16)},
        {"z": random_array(rng, (500, 1000), ml_dtypes.bfloat16)},
    ]
    if is_folder:
        return write_sharded(folder / "base", shards, {"a": 1})
    return write_safetensors(folder / "base.safetensors", shards[0] | shards[1])


def digest(path: Path) -> str:
    """One digest of a file, or of all files of a folder with their names."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def python(code: str, *arguments: object, prepare: Callable[[], None] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=prepare,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("is_folder", [False, True])
def test_killed_at_any_instant_the_target_is_whole(tmp_path: Path, is_folder: bool) -> None:
    """SIGKILL cannot be caught: the target is one of the two results, or for a folder between its
    two renames absent with the old one whole beside it."""
    base = make_base(tmp_path, is_folder)
    before = digest(base)
    out = tmp_path / ("out" if is_folder else "out.safetensors")
    files, whole = [], set()
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.sdelta")
        sdelta.save(delta_on(SHAPE, seed), files[-1])
        merge(base, files[-1], out, force=True)
        whole.add(digest(out))
    assert len(whole) == 2
    chance = random.Random(41)
    for _ in range(5):
        arguments = [sys.executable, "-c", LOOP, str(base), str(out), *map(str, files)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        if out.exists():
            assert digest(out) in whole
        else:
            (aside,) = tmp_path.glob(".out.*.old/out")
            assert digest(aside) in whole
            aside.rename(out)
        assert digest(base) == before
    merge(base, files[0], out, force=True)
    assert digest(out) in whole


@pytest.mark.parametrize("is_folder", [False, True])
def test_interrupted_at_any_progress_nothing_is_left(tmp_path: Path, is_folder: bool) -> None:
    base = make_base(tmp_path, is_folder)
    out = tmp_path / ("out" if is_folder else "out.safetensors")
    delta = delta_on(SHAPE, 3)
    steps: list[int] = []
    merge(base, delta, out, progress=lambda done, _: steps.append(done))
    kept = digest(out)
    for stop in steps:

        def interrupt(done: int, _: int, stop: int = stop) -> None:
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(base, delta_on(SHAPE, 4), out, force=True, progress=interrupt)
        assert {p.name for p in tmp_path.iterdir()} == {base.name, out.name}
        assert digest(out) == kept


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, is_folder: bool) -> None:
    """A limit on file sizes stands in for the disk."""
    base = make_base(tmp_path, is_folder)
    file = tmp_path / "d.sdelta"
    sdelta.save(delta_on(SHAPE, 5), file)
    out = tmp_path / ("out" if is_folder else "out.safetensors")
    before = sorted(tmp_path.rglob("*"))
    limit = (700_000, 700_000)
    told = python(
        ONCE, base, file, out, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert told == f"cannot write {out}: File too large; nothing was left behind"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_read_only_folder_is_said(tmp_path: Path, is_folder: bool) -> None:
    base = make_base(tmp_path, is_folder)
    file = tmp_path / "d.sdelta"
    sdelta.save(delta_on(SHAPE, 6), file)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    out = locked / ("out" if is_folder else "out.safetensors")

    def obey_permissions() -> None:
        """Root may write anywhere unless it gives up CAP_DAC_OVERRIDE before it executes."""
        if os.geteuid() == 0:
            ctypes.CDLL(None).prctl(24, 1)

    told = python(ONCE, base, file, out, prepare=obey_permissions)
    assert told == f"cannot write {out}: Permission denied; nothing was left behind"


def test_memory_stays_below_what_the_report_says(tmp_path: Path) -> None:
    """Python's and NumPy's own allocations, for a delta of 300k entries in add and set."""
    base = make_base(tmp_path, is_folder=False)
    add = delta_on(SHAPE, 7, 300_000)
    words = (np.arange(add.nnz) % 1000 + 0x3F80).astype(np.uint16)  # 1.0 and up
    bits = TensorDelta(
        name="w",
        shape=SHAPE,
        dtype="bfloat16",
        mode="set",
        indices=add.tensors["w"].indices,
        values=words,
        base_values=words - 1,
    )
    sdelta.save(add, tmp_path / "a.sdelta")
    sdelta.save(SparseDelta(tensors={"w": bits}), tmp_path / "b.sdelta")
    for number, (files, weights) in enumerate(
        [(["a"], [1]), (["b"], [1]), (["a", "a", "b"], [1, 0.5, 0.5])]
    ):
        paths = [tmp_path / f"{name}.sdelta" for name in files]
        tracemalloc.start()
        report = merge(base, paths, tmp_path / f"{number}.safetensors", weights=weights)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < report.peak_memory < 8 * peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_follow_the_size_of_the_model(tmp_path: Path) -> None:
    """Peak resident memory of a process: mapped pages of the base count, as the system sees it."""
    grown = []
    for rows in (8_000, 128_000):
        base = tmp_path / f"{rows}.safetensors"
        shape = (rows, 1000)
        text = f'{{"w":{{"dtype":"BF16","shape":[{rows},1000],"data_offsets":[0,{rows * 2000}]}}}}'
        with base.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text.encode())
            file.truncate(8 + len(text) + rows * 2000)
        delta = tmp_path / f"{rows}.sdelta"
        made = delta_on(shape, 8, 20_000)
        identity = identify(Checkpoint(base), {"w": made.tensors["w"].indices})
        sdelta.save(replace(made, base=identity), delta)
        grown.append(int(python(MEMORY, base, delta, tmp_path / f"{rows}-out.safetensors")))
    small, large = grown
    assert small > 0  # something was measured
    assert (
        large < small + 80_000
    )  # kB; the files have 16 and 256 MB, 64 MB of which are mapped at once
