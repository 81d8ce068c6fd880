"""What training costs on a CUDA device: a Llama of 1.2 billion weights, against its peers, in turns.

    pip install -e .[train,peers] && python benchmarks/gpu.py [--rounds 20] [--json]
    python benchmarks/gpu.py --kernels [--json]     # each kernel against torch's own functions

It is meant for a device and has not been run on one yet: nothing in RESULTS.md comes from it.
`--device cpu --layers 2 --hidden 64 ...` goes the same ways through the code where there is none;
what it prints then tells nothing.

Step: random weights of Llama 3.2's 1B shape in bfloat16, random tokens. Contestants take turns step
by step in one process, each with a model of its own (some 30 GB in all; `--only` for fewer), the
device waited for after each step; printed are medians over those of forward+backward. Memory: the
peak that torch allocated over three steps of each contestant alone, less its weights. The random
mask and ID3 train `--share` of the weights, LoRA and SHiRA queries and values as peft has it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

import deltakit as dk
from deltakit.kernels import dispatch
from deltakit.mixed.changes import Change
from deltakit.mixed.linear import BatchedLinear
from deltakit.mixed.rows import Rows
from deltakit.training.entries import Entries
from deltakit.training.sampled import sampled_embedding, sampled_product
from deltakit.training.target import Target

STEPS = 1000  # of the run that the measured steps are part of
FLOOR = "forward+backward"
Step = Callable[[torch.Tensor], object]


def llama(options: argparse.Namespace) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=max(1, options.heads // 4),
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def _loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def forward_backward(options: argparse.Namespace) -> tuple[torch.nn.Module, Step]:
    model = llama(options)

    def step(tokens: torch.Tensor) -> None:
        _loss(model, tokens).backward()
        model.zero_grad()

    return model, step


def sparse(options: argparse.Namespace, kind: str) -> tuple[torch.nn.Module, Step]:
    model = llama(options)
    budget = round(options.share * sum(p.numel() for p in model.parameters()))
    if kind == "id3":  # from the second step on as in the middle of a run
        each = budget // 2 // STEPS
        schedule = [budget - each * STEPS] + [each] * STEPS
        method: object = dk.ID3(budget=budget, steps=STEPS + 1, schedule=schedule)
    else:
        method = dk.RandomMask(budget=budget)
    tuner = dk.SparseTuner(model, method, lr=1e-3)

    def step(tokens: torch.Tensor) -> None:
        _loss(model, tokens).backward()
        tuner.step()

    return model, step


def dense(options: argparse.Namespace, kind: str) -> tuple[torch.nn.Module, Step]:
    """Fused AdamW on all weights, or on what peft trains."""
    model = llama(options)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    elif kind == "shira":
        from peft import ShiraConfig, get_peft_model

        model = get_peft_model(model, ShiraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(tokens: torch.Tensor) -> None:
        _loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


CONTESTANTS: dict[str, Callable[[argparse.Namespace], tuple[torch.nn.Module, Step]]] = {
    FLOOR: forward_backward,
    "ID3": partial(sparse, kind="id3"),
    "random mask": partial(sparse, kind="mask"),
    "PEFT LoRA r8 (q, v)": partial(dense, kind="lora"),
    "PEFT SHiRA r8 (q, v)": partial(dense, kind="shira"),
    "full AdamW, fused": partial(dense, kind="full"),
}


def finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call after three rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            finish(device)
            start = time.perf_counter()
            call()
            finish(device)
            if number >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens)
    made = torch.randint(0, options.vocabulary, shape, generator=generator)
    return made.to(options.device)


def step_seconds(options: argparse.Namespace) -> dict[str, float]:
    tokens = tokens_of(options)
    made = {name: CONTESTANTS[name](options)[1] for name in options.only}
    calls = {name: partial(step, tokens) for name, step in made.items()}
    return in_turns(calls, options.rounds, options.device)


def peak_above_weights(options: argparse.Namespace, name: str) -> float | None:
    """MB that torch allocated beyond the model's weights, at most; None where it does not count."""
    if options.device == "cpu":
        return None
    model, step = CONTESTANTS[name](options)
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step(tokens_of(options))
    peak = torch.cuda.max_memory_allocated()
    del model, step
    gc.collect()
    torch.cuda.empty_cache()
    return (peak - weights) / 1e6


def by_torch(call: Callable[[], Any]) -> Any:
    """The same call with torch's own functions."""
    kept = dispatch._has_triton
    dispatch._has_triton = cache(lambda: False)
    try:
        return call()
    finally:
        dispatch._has_triton = kept


def kernel_seconds(options: argparse.Namespace) -> dict[str, float]:
    ours = kernel_calls(options)
    theirs = by_torch(partial(kernel_calls, options))
    calls: dict[str, Callable[[], object]] = {}
    for name, call in ours.items():
        calls |= {name: call, f"{name} by torch": partial(by_torch, theirs[name])}
    return in_turns(calls, options.rounds, options.device)


def kernel_calls(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is done by a kernel, where dispatch has one."""
    torch.manual_seed(0)
    device, size, count = options.device, options.hidden, options.batch * options.tokens
    x, gradient = (torch.randn(count, size, device=device).bfloat16() for _ in range(2))
    calls: dict[str, Callable[[], object]] = {}
    for share in (0.0001, 0.001, 0.01):
        starts, columns = _pattern(size, size, share, device)
        arguments = (x, gradient, starts, columns)
        calls[f"sampled product, {share:.2%}"] = partial(
            sampled_product, *arguments, activations_left=False
        )
    calls["dense product, for comparison"] = lambda: gradient.t() @ x
    starts, columns = _pattern(options.vocabulary, size, 0.001, device)
    tokens = tokens_of(options)
    lookup = (tokens, gradient, starts, columns, int(starts.diff().max()), -1)
    calls["embedding, 0.10%"] = partial(sampled_embedding, *lookup)
    weight = torch.nn.Parameter(x.clone())
    target = Target(0, "w", "w", weight)
    entries = Entries([target], max(1, weight.numel() // 100))
    entries.add(target, torch.randperm(weight.numel(), device=device)[: len(entries.values)], 0)
    calls["write-through, 1%"] = entries.write_through
    scored = torch.randn(min(count * size, 2**24), device=device)
    calls["above a bound, 0.1%"] = partial(_above, scored, 3.29)
    changes = {}
    for task in (1, 2, 3, 4):
        at = torch.randperm(size * size, device=device)[: size * size // 1000].sort().values
        values = torch.randn(len(at), device=device)
        changes[task] = Change(at, values, values)
    rows = Rows([task % 5 for task in range(options.batch)])
    inputs = x.view(options.batch, options.tokens, size)
    rows.enter(torch.nn.Identity(), (inputs,), {})
    output = torch.zeros_like(inputs)
    hook = BatchedLinear("w", (size, size), changes, {}, 4, transposed=False)
    calls["mixed batch, 4 tasks of 0.10%"] = lambda: hook(rows, (inputs,), {}, output)
    return calls


def _pattern(
    rows: int, columns: int, share: float, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    count = max(1, round(share * rows * columns))
    chosen = torch.randint(0, rows * columns, (count,), device=device).unique()
    counts = torch.bincount(chosen // columns, minlength=rows)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return starts, (chosen % columns).int()


def _above(scored: torch.Tensor, bound: float) -> object:
    from deltakit.selection.pools import _where_at_least

    return _where_at_least(scored, scored.abs(), bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.001)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--kernels", action="store_true", help="kernels instead of steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.kernels:
        times = kernel_seconds(options)
        if options.json:
            print(json.dumps({"seconds": times}))
            return
        print(f"{'what':36}{'ms':>9}{'x torch':>9}")
        for name, time_taken in times.items():
            if not name.endswith(" by torch"):
                ratio = time_taken / times[f"{name} by torch"]
                print(f"{name:36}{1000 * time_taken:9.3f}{ratio:9.2f}")
        return
    memory = {name: peak_above_weights(options, name) for name in options.only}
    times = step_seconds(options)
    if options.json:
        print(json.dumps({"seconds": times, "peak_mb_above_weights": memory}))
        return
    reference = times.get(FLOOR, float("nan"))
    print(f"{'contestant':24}{'s/step':>9}{'x fwd+bwd':>11}{'peak MB above weights':>23}")
    for name in options.only:
        megabytes = memory[name]
        told = "-" if megabytes is None else f"{megabytes:.0f}"
        print(f"{name:24}{times[name]:9.4f}{times[name] / reference:11.2f}{told:>23}")


if __name__ == "__main__":
    main()
