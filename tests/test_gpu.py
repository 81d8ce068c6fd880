"""The path of a device on a device. What needs none is in `test_kernels.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from device_lab import TOKENS, Net, merged, same, train, trainer
from torch import nn

import deltakit as dk
from deltakit.mixed.batch import mixed_batch
from deltakit.selection.d3 import D3
from deltakit.selection.pools import Pools
from deltakit.training.gradient_path import GradientPath

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PATHS: list[GradientPath] = ["sampled", "submatrix", "dense"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def never_waiting() -> Iterator[None]:
    """Within the block torch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_keep_their_laws() -> None:
    """Those that the interpreter was shown, compiled."""
    pytest.importorskip("triton", reason="Triton is not installed")
    laws = str(Path(__file__).parent / "interpreted_kernels.py")
    clean = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", laws]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_steps_never_wait_and_train_what_a_cpu_does(path: GradientPath, dtype: torch.dtype) -> None:
    """Twice the very same; within rounding of a CPU; weights to the bit those of merging."""
    tokens, made = TOKENS.cuda(), []
    for _ in range(2):
        model, optimizer = trainer(path, dtype, device="cuda")
        train(model, optimizer, 1, tokens)
        with never_waiting():
            train(model, optimizer, 2, tokens)
        made.append((model, optimizer))
    assert same(made[0][0], made[1][0])
    reference, by_cpu = trainer(path, dtype)
    train(reference, by_cpu, 3)
    entries = made[0][1].engine.entries
    narrow = dtype != torch.float32
    expected = by_cpu.engine.entries.values
    torch.testing.assert_close(
        entries.values.cpu(), expected, rtol=0, atol=2e-2 if narrow else 1e-3
    )
    untouched = dict(Net(dtype).cuda().named_parameters())
    for target in entries.targets:
        assert torch.equal(target.flat, merged(target, entries, untouched[target.name]))


@pytest.mark.parametrize("exp", [0.0, 1.3])
def test_selection_is_a_cpus(exp: float) -> None:
    """The same entries in the same order, ties and all."""
    torch.manual_seed(0)
    gradients = [torch.randint(-9, 9, (rows, 700)) / 8 for rows in (5, 400, 400)]
    weights = [torch.randint(1, 9, (gradient.numel(),)) / 8 for gradient in gradients]
    found = []
    for device in ("cuda", "cpu"):
        pools = Pools(D3(1.0, exp), [weight.numel() for weight in weights])
        pools.open(3000)
        for number in (1, 0, 2):
            parts = gradients[number].to(device), weights[number].to(device)
            pools.offer(number, *parts, (0.125, 1.0), "w")
        found.append(pools.best(lambda number: np.zeros(0, np.int64)))
    for (tensor, *parts), (reference, *expected) in zip(*found, strict=True):
        assert tensor == reference
        assert all(torch.equal(a.cpu(), b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batches_equal_their_tasks_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).to("cuda", dtype)
    deltas = {}
    for seed in range(3):
        tuner = dk.SparseTuner(base, dk.RandomMask(budget=300, seed=seed), lr=0.1)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        base(torch.randn(4, 64, device="cuda", dtype=dtype)).float().square().sum().backward()
        tuner.step()
        deltas[f"task {seed}"] = tuner.delta()
        tuner.close()
        base.load_state_dict(before)
    batch = mixed_batch(base, deltas)
    x = torch.randn(4, 5, 64, device="cuda", dtype=dtype)
    tasks = ["task 1", None, "task 0", "task 2"]
    with batch.rows(tasks):
        together, again = base(x), base(x)
    assert torch.equal(together, again)
    for row, task in enumerate(tasks):
        own = nullcontext() if task is None else dk.applied(base, deltas[task])
        with torch.no_grad(), own:
            alone = base(x[row : row + 1])[0]
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(together[row], alone, rtol=tolerance, atol=tolerance)
