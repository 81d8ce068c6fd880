"""What a mixed batch costs against a plain forward pass and against separate passes, in one run.

    pip install -c constraints.txt -e .[dev]
    python benchmarks/mixed_batch.py [--rounds 9] [--threads 1 2] [--clock cpu] [--json]

16 rows over 8 tasks whose deltas hold 0.1 % of all weights, at random, of random models: MiniLM-L6's
shape and a Llama of 8 layers of 1,024 features. Contestants take turns in one process: one plain
forward pass of the 16 rows, one mixed one, and for each task in turn apply, a pass of its two
rows, revert. Printed are ratios of medians, for 64 tokens per row and for one (a step of generation
without its cache). Memory: what a mixed batch keeps, by the growth of the resident size, over the
size of the model's weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import deltakit as dk
from deltakit.mixed.batch import MixedBatch, mixed_batch

ROWS, TASKS, DENSITY = 16, 8, 0.001
TOKENS = (64, 1)
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def minilm() -> Any:
    """22.7 M weights."""
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertModel(BertConfig(**shape, intermediate_size=1536))


def llama() -> Any:
    """100 M weights."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = LlamaConfig(**shape, num_key_value_heads=4, intermediate_size=2816, vocab_size=8000)
    return LlamaForCausalLM(config)


MODELS = {"MiniLM-L6": minilm, "Llama 8 x 1024": llama}


def random_delta(model: torch.nn.Module, seed: int) -> dk.SparseDelta:
    """Entries drawn from all weights alike."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        chosen = np.flatnonzero(draw.random(parameter.numel(), np.float32) < DENSITY)
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=tuple(parameter.shape),
            dtype="float32",
            mode="add",
            indices=chosen,
            values=draw.normal(0, 0.01, len(chosen)),
        )
    return dk.SparseDelta(tensors=tensors)


def contestants(
    model: Any, deltas: dict[str, dk.SparseDelta], mixed: MixedBatch, ids: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """The passes that are compared."""
    names = [f"task {row * TASKS // ROWS}" for row in range(ROWS)]

    @torch.no_grad()
    def plain() -> None:
        model(input_ids=ids)

    def at_once() -> None:
        with mixed.rows(names):
            model(input_ids=ids)

    @torch.no_grad()
    def separate() -> None:
        for task, rows in zip(deltas, ids.split(ROWS // TASKS), strict=True):
            with dk.applied(model, deltas[task]):
                model(input_ids=rows)

    @torch.no_grad()
    def separate_without_switching() -> None:
        for rows in ids.split(ROWS // TASKS):
            model(input_ids=rows)

    return {
        "plain": plain,
        "mixed": at_once,
        "separate": separate,
        "separate, switching for free": separate_without_switching,
    }


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each call after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if number:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    found: list[tuple[str, float]] = []
    for name in options.models:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        deltas = {f"task {n}": random_delta(model, n) for n in range(TASKS)}
        before = resident()
        mixed = mixed_batch(model, deltas)
        found.append((f"{name}: memory kept / weights", (resident() - before) / size))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for tokens in TOKENS:
                ids = torch.randint(0, 8000, (ROWS, tokens))
                calls = contestants(model, deltas, mixed, ids)
                seconds = in_turns(calls, options.rounds, CLOCKS[options.clock])
                what = f"{name}, {ROWS} x {tokens} tokens, {threads} thread(s): mixed / "
                for other in calls:
                    if other != "mixed":
                        found.append((what + other, seconds["mixed"] / seconds[other]))
    if options.json:
        print(json.dumps([{"what": what, "ratio": ratio} for what, ratio in found]))
        return
    for what, ratio in found:
        print(f"{what:90}{ratio:8.3f}")


if __name__ == "__main__":
    main()
