"""Merging a checkpoint of many weight files: one merge, several workers, and arrays of jobs, beside `cp`.

    python benchmarks/large_merge.py [--files 16] [--megabytes 64] [--entries 1000000]
        [--workers 1,2,4] [--jobs 4,16] [--at-once 2] [--rounds 3] [--folder DIR] [--json FILE]

The base's weights are holes (its headers are real), so that it takes no room and reading it costs
no disk; what is written is written in full and waits for the disk: merges by their own fsync, `cp
--sparse=never` by one of each file. Rounds alternate, after one that does not count. A job array is as
many fresh processes, `--at-once` of them at a time; the time of imports is in it and told beside.
Memory is the peak of the largest process above what imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from random_delta import random_delta

from deltakit.budget import format_bytes
from deltakit.formats import sdelta
from deltakit.formats.atomic import sync
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import Entry, render

SHAPE = (4096, 1024)  # 8.4 MB in bfloat16
CHILD = """
import json, re, sys, time
from pathlib import Path
import deltakit as dk
merge = dk.merge
def peak():  # ru_maxrss would start from the peak of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before, start = peak(), time.perf_counter()
merge(*sys.argv[1:4], **json.loads(sys.argv[4]))
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


@dataclass
class Measured:
    """One way to merge: seconds of each round, and the peak memory of its largest process."""

    name: str
    seconds: list[float] = field(default_factory=list)
    working: list[float] = field(default_factory=list)  # without starting and imports
    peak: int = 0


def write_base(folder: Path, files: int, megabytes: int) -> int:
    """Weight files of bfloat16 tensors that are holes; bytes of all of them."""
    folder.mkdir()
    size = SHAPE[0] * SHAPE[1] * 2
    each = max(1, round(megabytes * 1e6 / size))
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        names = [f"layers.{number * each + n}.weight" for n in range(each)]
        weight_map |= dict.fromkeys(names, name)
        entries = {t: Entry("BF16", SHAPE, n * size, (n + 1) * size) for n, t in enumerate(names)}
        head = render(entries, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + each * size)
    index = {"metadata": {"total_size": files * each * size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text("{}")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy(base: Path, out: Path) -> list[tuple[float, int]]:
    """`cp` of the folder, on the disk when it ends."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--sparse=never", base, out], check=True)
    for path in out.iterdir():
        sync(path)
    return [(time.perf_counter() - start, 0)]


def merge(
    base: Path, delta: Path, out: Path, options: Sequence[dict[str, object]], at_once: int
) -> list[tuple[float, int]]:
    """Processes that merge with these options; (seconds of merging, bytes of memory) of each."""

    def run(given: dict[str, object]) -> tuple[float, int]:
        command = [sys.executable, "-c", CHILD, str(base), str(delta), str(out), json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = json.loads(done.stdout)
        return seconds, peak

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run, options))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=64, help="of each weight file")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--jobs", default="4,16")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there, too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Write the inputs into `folder`, then time and weigh."""
    base, delta, out = folder / "base", folder / "delta.sdelta", folder / "out"
    size = write_base(base, options.files, options.megabytes)
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        sys.exit(f"{format_bytes(size)} are written at a time, {format_bytes(free)} are free")
    whole = Checkpoint(base)
    share = -(-options.entries // len(whole.names))
    made = random_delta(whole, dict.fromkeys(whole.names, share), np.random.default_rng(0))
    sdelta.save(made, delta)
    ways: dict[str, Callable[[], list[tuple[float, int]]]] = {"cp": lambda: copy(base, out)}
    for workers in map(int, options.workers.split(",")):
        alone = [{"workers": workers}]
        ways[f"merge --workers {workers}"] = partial(merge, base, delta, out, alone, 1)
    for jobs in map(int, options.jobs.split(",")):
        shards = [{"shard": f"{n}/{jobs}", "workers": 1} for n in range(1, jobs + 1)]
        way = f"{jobs} jobs, {options.at_once} at once"
        ways[way] = partial(merge, base, delta, out, shards, options.at_once)
    found = {name: Measured(name) for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            os.sync()
            start = time.perf_counter()
            told = way()
            if number:
                found[name].seconds.append(time.perf_counter() - start)
                found[name].working.append(sum(seconds for seconds, _ in told))
                found[name].peak = max(found[name].peak, *(peak for _, peak in told))
            shutil.rmtree(out)
            for mark in folder.glob(".out.*"):
                mark.unlink()
    report(found, size, delta.stat().st_size, options)


def report(found: dict[str, Measured], size: int, delta: int, options: argparse.Namespace) -> None:
    """Print a table, and write the numbers where asked."""
    entries = f"{options.entries:,} entries"
    print(
        f"base {format_bytes(size)} in {options.files} files, delta {format_bytes(delta)}, {entries}"
    )
    print(f"{'':<24} {'seconds':>8} {'GB/s':>6} {'of cp':>6} {'merging':>8} {'memory':>8}")
    usual = median(found["cp"].seconds)
    for way in found.values():
        taken = median(way.seconds)
        print(
            f"{way.name:<24} {taken:>8.2f} {size / taken / 1e9:>6.2f} {usual / taken:>6.2f} "
            f"{median(way.working):>8.2f} {format_bytes(way.peak):>8}"
        )
    if options.json is not None:
        ways = [asdict(way) for way in found.values()]
        numbers = {"bytes": size, "files": options.files, "delta_bytes": delta, "ways": ways}
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
