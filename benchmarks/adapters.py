"""Sparsified adapters against dense ones of the same size and of their own, on the docstring task.

    python benchmarks/adapters.py OUT [--seeds 0,1,2] [--threads 1] [--rows NAME,...] [--epochs 2]

MiniLM-L6 at batch 32, 64 tokens. Runs `benchmarks/fidelity.py` once per row and seed, which
appends to OUT/fidelity.jsonl and skips what is there, so that it can be stopped and gone on with; then
prints mean and deviation of test accuracy, and the size of the file, head included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

LORA_2 = 6 * 2 * 2 * (384 + 384)  # weights: layers x (query, value) x rank x (in + out)
NARROW = 6 * (2 * 384 * 12 + 12 + 384)  # of Pfeiffer adapters 12 wide
DENSE = ["--budget", "100%"]
LORA_SIZE, NARROW_SIZE = ["--budget", str(LORA_2)], ["--budget", str(NARROW)]


def lora(rank: int) -> list[str]:
    """Queries and values, with the usual alpha of twice the rank."""
    return ["--adapter", "lora", "--rank", str(rank), "--adapter-options", f"alpha={2 * rank}"]


def pfeiffer(reduction: int) -> list[str]:
    """After every feed-forward block, `384 / reduction` wide."""
    return ["--adapter", "pfeiffer", "--adapter-options", f"reduction_factor={reduction}"]


# row -> (method or preset of fidelity.py, learning rate, flags)
ROWS: dict[str, tuple[str, float, list[str]]] = {
    "lora r2": ("random", 5e-3, [*lora(2), *DENSE]),
    "lora r32": ("random", 2e-3, [*lora(32), *DENSE]),
    "lora r32 by id3": ("id3", 2e-2, [*lora(32), *LORA_SIZE]),
    "lora r32 by a random mask": ("random", 2e-2, [*lora(32), *LORA_SIZE]),
    "pfeiffer 12": ("random", 3e-3, [*pfeiffer(32), *DENSE]),
    "pfeiffer 192": ("random", 3e-3, [*pfeiffer(2), *DENSE]),
    "pfeiffer 192 by id3": ("id3", 1e-2, [*pfeiffer(2), *NARROW_SIZE]),
    "pfeiffer 192 by sparse-adapter": ("sparse-adapter", 1e-2, [*pfeiffer(2), *NARROW_SIZE]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--epochs", default="2")
    options = parser.parse_args()
    length = [] if options.epochs == "2" else ["--epochs", options.epochs]
    rows = {name: (row[0], row[1], [*row[2], *length]) for name, row in ROWS.items()}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = options.rows.split(",")
    script = Path(__file__).with_name("fidelity.py")
    for seed in seeds:
        for name in names:
            method, rate, flags = rows[name]
            given = ["--lr", str(rate), "--seed", str(seed), "--threads", options.threads]
            command = [sys.executable, str(script), str(options.out), method, *given, "--", *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (options.out / "fidelity.jsonl").read_text().splitlines()]
    print("| adapter | entries | test accuracy | file |\n| --- | --- | --- | --- |")
    for name in names:
        method, rate, flags = rows[name]
        key = {"row": method, "lr": rate, "flags": flags}
        mine = [line for line in lines if key.items() <= line.items() and line["seed"] in seeds]
        tests = [100 * line["test"] for line in mine]
        spread = f" ± {statistics.stdev(tests):.1f}" if len(tests) > 1 else ""
        entries, size = mine[0]["entries"], statistics.fmean(line["bytes"] for line in mine)
        print(f"| {name} | {entries:,} | {statistics.fmean(tests):.1f}{spread} | {size:,.0f} B |")


if __name__ == "__main__":
    main()
