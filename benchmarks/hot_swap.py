"""Hot-swapping 1.1M entries in a live bfloat16 model of 1.1B weights, beside PEFT's merge and unmerge.

    python benchmarks/hot_swap.py [--rounds 10] [--swaps 1000] [--small]

The model has TinyLlama's shapes and random weights; nothing is read from disk. `DeltaBank` switches
a task on and off, `dk.apply` does it from a delta in memory (base digests checked), and random
swaps of eight tasks, half of whose entries are shared, end with every tensor compared to the base,
bit for bit. Then PEFT merges and unmerges SHiRA of r = 1 (which has fewer entries: 0.8M) and LoRA of
r = 8 on the linear layers of the same model; the weights that differ afterwards are counted.
Times are of both halves together; torch uses its own number of threads, which is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import deltakit as dk
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.arrays import to_numpy

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = 8


def make_model(layers: int) -> LlamaForCausalLM:
    """Random weights, one block of them repeated: filling 2.2 GB with fresh ones takes minutes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    return model.eval()


def make_deltas(model: torch.nn.Module, entries: int) -> list[dk.SparseDelta]:
    """Deltas of exactly `entries` entries each, spread evenly; half of them are in every delta."""
    rng = np.random.default_rng(0)
    shapes = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    total = sum(p.numel() for p in shapes.values())
    counts = {n: entries * p.numel() // total for n, p in shapes.items()}
    counts[next(iter(counts))] += entries - sum(counts.values())
    tensors: list[dict[str, dk.TensorDelta]] = [{} for _ in range(TASKS)]
    prints: list[dict[str, dk.Fingerprint]] = [{} for _ in range(TASKS)]
    for name, parameter in shapes.items():
        flat, shape = parameter.data.view(-1), tuple(parameter.shape)
        sample = to_numpy(flat[torch.from_numpy(sample_positions(name, shape))])
        shared = rng.choice(len(flat), counts[name] // 2, replace=False, shuffle=False)
        for number in range(TASKS):
            own = rng.choice(len(flat), 2 * counts[name], replace=False, shuffle=False)
            own = np.setdiff1d(own, shared)
            more = rng.choice(own, counts[name] - len(shared), replace=False)
            indices = np.sort(np.concatenate([shared, more]))
            tensors[number][name] = dk.TensorDelta(
                name=name,
                shape=shape,
                dtype="bfloat16",
                mode="add",
                indices=indices,
                values=rng.standard_normal(len(indices)) * 0.01,
            )
            support = to_numpy(flat[torch.from_numpy(indices)])
            prints[number][name] = fingerprint(sample, support)
    return [
        dk.SparseDelta(tensors=t, base=dk.BaseIdentity(tensors=p))
        for t, p in zip(tensors, prints, strict=True)
    ]


def milliseconds(action: Callable[[], object], rounds: int) -> list[float]:
    """Wall-clock times of an action, after one round that does not count."""
    times = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        action()
        if number:
            times.append(1000 * (time.perf_counter() - start))
    return times


def report(what: str, times: list[float], reference: float) -> None:
    """One line: the median, the range, and the ratio to DeltaBank's median."""
    middle = median(times)
    print(
        f"{what:<34}{middle:>9.1f} ms  (from {min(times):.1f} to {max(times):.1f}), "
        f"{middle / reference:.1f} times DeltaBank"
    )


def changed(model: torch.nn.Module, base: dict[str, torch.Tensor]) -> int:
    """How many weights differ from the base's."""
    return sum(int((p.data != base[n]).sum()) for n, p in model.named_parameters())


def random_mask(layer: torch.nn.Linear, r: int, **_: Any) -> torch.Tensor:
    """SHiRA's random mask; PEFT's own permutes all weights, which only makes the set-up slow."""
    rng, (m, n) = np.random.default_rng(0), layer.weight.shape
    places = rng.choice(m * n, r * (m + n), replace=False, shuffle=False)
    mask = torch.zeros_like(layer.weight)
    mask.view(-1)[torch.from_numpy(places)] = 1
    return mask


def peer(model: torch.nn.Module, config: Any, rounds: int) -> list[float]:
    """Times of PEFT's merge and unmerge of a fresh adapter; the model is unwrapped again."""
    wrapped = get_peft_model(model, config)

    def there_and_back() -> None:
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()

    with torch.no_grad():
        times = milliseconds(there_and_back, rounds)
    wrapped.unload()
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--small", action="store_true", help="two layers, 220,000 entries")
    options = parser.parse_args()
    model = make_model(2 if options.small else 22)
    entries = 220_000 if options.small else 1_100_000
    base = {n: p.data.clone() for n, p in model.named_parameters()}
    deltas = make_deltas(model, entries)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{weights / 1e6:.0f}M bfloat16 weights, {entries} entries, "
        f"{torch.get_num_threads()} threads"
    )
    bank = dk.DeltaBank(model, {f"task {n}": delta for n, delta in enumerate(deltas)})
    start = time.perf_counter()
    for task in bank.names():
        bank.prepare(task)
    print(f"making a task ready: {1000 * (time.perf_counter() - start) / TASKS:.0f} ms")

    def switch() -> None:
        bank.activate("task 0")
        bank.deactivate()

    times = milliseconds(switch, options.rounds)
    reference = median(times)
    report("DeltaBank: activate, deactivate", times, reference)
    cold = milliseconds(lambda: dk.apply(model, deltas[0]).revert(), options.rounds)
    report("dk.apply, handle.revert", cold, reference)
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    for task in rng.integers(TASKS, size=options.swaps):
        bank.activate(f"task {task}")
    taken = 1000 * (time.perf_counter() - start) / max(1, options.swaps)
    bank.deactivate()
    equal = all(torch.equal(p.data, base[n]) for n, p in model.named_parameters())
    print(
        f"{options.swaps} random swaps of {TASKS} tasks, {taken:.1f} ms each; bits equal: {equal}"
    )
    shira = ShiraConfig(r=1, target_modules=LINEAR, init_weights=False)
    shira.mask_fn = random_mask
    report("PEFT SHiRA r=1: merge, unmerge", peer(model, shira, options.rounds), reference)
    print(f"weights that differ from the base afterwards: {changed(model, base)}")
    lora = LoraConfig(r=8, target_modules=LINEAR, init_lora_weights=False)
    report("PEFT LoRA r=8: merge, unmerge", peer(model, lora, options.rounds), reference)
    print(f"weights that differ from the base afterwards: {changed(model, base)}")


if __name__ == "__main__":
    main()
