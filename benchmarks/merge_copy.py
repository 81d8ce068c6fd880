"""Merging against copying: 100,000 entries into a bfloat16 checkpoint of 500 MB, beside `cp`.

    python benchmarks/merge_copy.py [--megabytes 500] [--rounds 5] [--folder DIR]

Rounds of `cp` and `merge` alternate in one run, after one of each that does not count. Both are
timed to the moment the data are on the disk (`merge` always does that, `cp` is followed by an fsync
of its file); `cp` alone is timed too. Peak memory is that of a fresh process that merges.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from random_delta import random_delta

from deltakit.budget import format_bytes
from deltakit.formats import sdelta
from deltakit.formats.atomic import sync
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import Entry, render
from deltakit.merging.merge import merge

ENTRIES = 100_000
SHAPE = (4096, 1024)  # 8.4 MB in bfloat16
CHILD = """
import re, sys
from pathlib import Path
from deltakit.merging.merge import merge
def peak():  # ru_maxrss would start from the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
report = merge(*sys.argv[1:], force=True)
print(before, peak(), report.peak_memory)
"""


def write_base(path: Path, tensors: int, rng: np.random.Generator) -> None:
    """Random bfloat16 words with exponents as trained weights have them."""
    size = SHAPE[0] * SHAPE[1] * 2
    entries = {
        f"layers.{n}.weight": Entry("BF16", SHAPE, n * size, (n + 1) * size) for n in range(tensors)
    }
    with path.open("wb") as file:
        file.write(render(entries, {"format": "pt"}))
        for _ in range(tensors):
            words = rng.standard_normal(SHAPE, np.float32).view(np.uint32) >> 16
            file.write(words.astype(np.uint16).tobytes())


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(folder, options.megabytes, options.rounds)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, megabytes: int, rounds: int) -> None:
    """Write the inputs into `folder`, then time and weigh."""
    rng = np.random.default_rng(0)
    base, delta = folder / "base.safetensors", folder / "delta.sdelta"
    copy, out = folder / "copy.safetensors", folder / "out.safetensors"
    write_base(base, round(megabytes * 1e6 / (SHAPE[0] * SHAPE[1] * 2)), rng)
    whole = Checkpoint(base)
    counts = dict.fromkeys(whole.names, -(-ENTRIES // len(whole.names)))
    sdelta.save(random_delta(whole, counts, rng), delta)
    os.sync()
    actions: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", base, copy], check=True),
        "cp and sync": lambda: (subprocess.run(["cp", base, copy], check=True), sync(copy)),
        "merge": lambda: merge(base, delta, out, force=True),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            for path in (copy, out):
                path.unlink(missing_ok=True)
            os.sync()
            taken = seconds(action)
            if number:
                times[name].append(taken)
    size = format_bytes(base.stat().st_size)
    print(f"base {size}, delta {format_bytes(delta.stat().st_size)}, {ENTRIES} entries")
    for name, taken in times.items():
        print(f"{name:>12}: {median(taken):.3f} s (from {min(taken):.3f} to {max(taken):.3f})")
    merged = median(times["merge"])
    print(f"merge / cp and sync: {merged / median(times['cp and sync']):.2f}")
    print(f"merge / cp: {merged / median(times['cp']):.2f}")
    child = [sys.executable, "-c", CHILD, str(base), str(delta), str(out)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    before, peak, told = (int(number) for number in done.stdout.split())
    print(
        f"peak resident memory of a process: {format_bytes(peak * 1024)}, of which the imports "
        f"took {format_bytes(before * 1024)}; announced above that: {format_bytes(told)}"
    )


if __name__ == "__main__":
    main()
