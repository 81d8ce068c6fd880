"""TIES of 8 deltas of 10 million entries each at density 0.2, in memory: seconds and peak memory.

Before that, truncating one of them to a tenth.

    python benchmarks/stack_speed.py [--method ties] [--entries 10m] [--deltas 8] [--density 0.2]

The supports are random, 1 % of a model of 200 tensors; peak memory is told beside that of the deltas
alone.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import numpy as np

from deltakit.budget import format_bytes, parse_budget
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.formats.seeded import seeded_support
from deltakit.stacking import stack
from deltakit.truncation import truncate

TENSORS = 200
DENSITY = 0.01  # entries over all weights


def random_delta(entries: int, seed: int) -> SparseDelta:
    """Normal changes at random places, the same number in each tensor."""
    rng = np.random.default_rng(seed)
    each = entries // TENSORS
    rows = max(1, round(each / DENSITY / 4096))
    tensors = {}
    for number in range(TENSORS):
        name = f"layers.{number}.weight"
        tensors[name] = TensorDelta(
            name=name,
            shape=(rows, 4096),
            dtype="bfloat16",
            mode="add",
            indices=seeded_support(seed, name, rows * 4096, each),
            values=rng.standard_normal(each, np.float32),
        )
    return SparseDelta(tensors=tensors)


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--entries", default="10m")
    parser.add_argument("--deltas", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.2)
    given = parser.parse_args()
    deltas = [random_delta(parse_budget(given.entries), seed) for seed in range(given.deltas)]
    start = time.perf_counter()
    kept = truncate(deltas[0], deltas[0].nnz // 10)
    took = time.perf_counter() - start
    print(f"truncating {deltas[0].nnz:,} entries to {kept.nnz:,}: {took:.2f} s")
    del kept
    held = memory("VmRSS")
    options = {} if given.method == "linear" else {"density": given.density}
    wall, cpu = time.perf_counter(), time.process_time()
    made = stack(deltas, given.method, **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{given.method} of {given.deltas} deltas of {deltas[0].nnz:,} entries: {made.nnz:,} left"
    )
    print(f"{wall:.2f} s, {cpu:.2f} s of processor time")
    print(f"deltas {format_bytes(held)}, peak {format_bytes(memory('VmHWM'))}")


if __name__ == "__main__":
    main()
