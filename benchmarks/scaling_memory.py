"""Peak memory of ranks that train, against the arithmetic: real processes, gloo, on one machine."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import scaling_arithmetic as cost
import torch
import torch.distributed as dist
from scaling_shapes import Model, llama
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import deltakit as dk
from deltakit.training.memory import PeakMemory, resident_bytes

SHAPE = {"layers": 8, "hidden": 1024, "inner": 4096, "heads": 8, "kv_heads": 2, "vocabulary": 8192}
TINY = {"layers": 2, "hidden": 64, "inner": 128, "heads": 4, "kv_heads": 2, "vocabulary": 256}
DENSITY, TOKENS, STEPS, BYTES = 0.02, 32, 3, 4
# Blocks of more than 64 kB go back to the system when they are freed, so that the resident size
# tells what is in use and not what the allocator keeps for later.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
Step = Callable[[], object]
Numbers = dict[str, int]


def live(shape: Numbers) -> LlamaForCausalLM:
    """A random float32 model of this shape."""
    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocabulary"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def sharded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """FSDP2: every layer a unit, and the rest the root."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def id3(k: int) -> dk.ID3:
    """Nearly all of the budget in the first step, which is not measured, then a hundredth a step."""
    slices = [k - STEPS * (k // 100)] + [k // 100] * STEPS
    return dk.ID3(budget=k, steps=len(slices), schedule=slices)


def sparse(method: Callable[[int], Any], model: torch.nn.Module, k: int) -> Step:
    return dk.SparseTuner(model, method(k), lr=1e-3).step


def full(model: torch.nn.Module, k: int) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


random_mask = partial(sparse, lambda k: dk.RandomMask(budget=k))
Expected = Callable[[Model, int, int], cost.Memory]


def fixed(arithmetic: Callable[..., cost.Memory]) -> Expected:
    """The arithmetic of a fixed support on a CPU, whose entries are all of one age."""
    return partial(arithmetic, b=BYTES, update=cost.ALIKE)


CASES: dict[str, tuple[bool, Callable[[torch.nn.Module, int], Step], Expected]] = {
    "fixed support, data parallel": (False, random_mask, fixed(cost.fixed_parallel)),
    "ID3 selecting, data parallel": (
        False,
        partial(sparse, id3),
        partial(cost.selecting_parallel, b=BYTES),
    ),
    "fixed support, FSDP2": (True, random_mask, fixed(cost.fixed_sharded)),
    "ID3 selecting, FSDP2": (
        True,
        partial(sparse, id3),
        partial(cost.selecting_sharded, b=BYTES),
    ),
    "full AdamW, data parallel": (
        False,
        full,
        lambda model, n, k: cost.full_parallel(model, n, BYTES),
    ),
    "full AdamW, FSDP2": (True, full, lambda model, n, k: cost.full_sharded(model, n, BYTES)),
}


def peak(case: str, shape: Numbers) -> dict[str, int]:
    """Bytes above what the process had before its model: at the peak of the steps after the first,
    and what a forward pass takes."""
    shards, trained, _ = CASES[case]
    before = resident_bytes()
    model = live(shape)
    inputs = {"input_ids": torch.arange(TOKENS)[None] % shape["vocabulary"]}
    inputs["labels"] = inputs["input_ids"]
    forward = PeakMemory()
    model(**inputs)
    activations = forward.above()
    assert before is not None and activations is not None
    if shards:
        model = sharded(model)
    k = round(DENSITY * llama("", **shape).weights)
    net: Any = model
    if trained is full and not shards:
        net = torch.nn.parallel.DistributedDataParallel(model)
    step = trained(net, k)
    at_rest, steps = 0, None
    for number in range(STEPS + 1):
        if number == 1:
            gc.collect()
            steps, at_rest = PeakMemory(), resident_bytes() or 0
        net(**inputs).loss.backward()
        step()
    assert steps is not None
    above = steps.above() or 0
    return {
        "peak": at_rest + above - before,
        "at rest": at_rest - before,
        "activations": activations,
    }


def as_rank(case: str, rank: int, ranks: int, folder: Path) -> None:
    """Measure in this process: in a tiny model first, which loads libraries and lays out buffers."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    peak(case, TINY)
    gc.collect()
    found = peak(case, SHAPE)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(case: str, ranks: int) -> dict[str, int]:
    """The largest figures over ranks."""
    script = str(Path(__file__).with_name("scaling.py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "memory", "--only", case, "--ranks", str(ranks)]
        command += ["--folder", folder, "--as-rank"]
        environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)
        ]
        try:
            if any(process.wait() for process in started):
                raise SystemExit(f"{case}: a rank failed")
        finally:
            for process in started:
                process.kill()
        told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
        return {name: max(rank[name] for rank in told) for name in told[0]}


def expected(case: str, ranks: int, activations: int) -> tuple[float, float]:
    """The arithmetic's peak with these activations, and what of it are weights."""
    model = llama("", **SHAPE)
    shards, _, arithmetic = CASES[case]
    memory = arithmetic(model, ranks, round(DENSITY * model.weights))
    backward = sum(memory.backward.values()) + activations
    if shards and "gradients" not in memory.backward:
        backward += BYTES * model.unit  # gloo gathers into a copy of its own, NCCL does not
    held = sum(memory.held.values())
    return held + max(backward, sum(memory.update.values())), memory.held["weights"]


def report(cases: list[str], ranks: int) -> str:
    """Arithmetic and measurement side by side, as Markdown."""
    weights = llama("", **SHAPE).weights
    what = f"{weights / 1e6:.0f} M weights in float32, {DENSITY:.0%} of them trained, {ranks} ranks"
    rows = [f"| {what} | arithmetic, MB | measured | ratio | without the weights |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    for case in cases:
        found = measured(case, ranks)
        told, held = expected(case, ranks, found["activations"])
        above = (found["peak"] - held) / (told - held)
        peaks = f"{told / 1e6:,.0f} | {found['peak'] / 1e6:,.0f}"
        rows.append(f"| {case} | {peaks} | {found['peak'] / told:.3f} | {above:.3f} |")
        print(rows[-1], found, file=sys.stderr, flush=True)
    return "\n".join(rows)
