"""Laws of the path that steps take on a device, with CPU tensors in the device's part.

`test_kernels.py` runs this module with TRITON_INTERPRET=1, once with Triton's kernels (interpreted)
and once with torch's own (DELTAKIT_KERNELS=torch).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from device_lab import TOKENS, Net, merged, same, train, trainer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import deltakit as dk
from deltakit.errors import TrainingError
from deltakit.kernels import dispatch
from deltakit.parallel.ranks import Ranks
from deltakit.selection.d3 import D3
from deltakit.selection.pools import Pools
from deltakit.training.gradient_path import GradientPath

assert dispatch.INTERPRETED
BY_TRITON = os.environ.get("DELTAKIT_KERNELS") != "torch"

# What makes the host wait for a device: numbers and shapes that only the device knows, and values
# of the host that are copied there (torch.tensor and its kin show as lift_fresh).
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "isin",
    "bincount",
    "lift_fresh",
    "lift_fresh_copy",
}


class NeverWaits(TorchDispatchMode):
    """Fails at an operator for which the host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the device"
        if name == "repeat_interleave":
            assert named.get("output_size") is not None, "the device counts the repeats"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for at in args[1]:
                assert at is None or at.dtype not in (torch.bool, torch.uint8), (
                    "a mask of positions"
                )
        return func(*args, **named)


class NeverReads(TorchFunctionMode):
    """Fails at what reads a CPU tensor's memory without an operator."""

    READING = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.READING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def never_waiting() -> Iterator[None]:
    with NeverReads(), NeverWaits():
        yield


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu().numpy(),
        lambda x: np.asarray(x),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.repeat_interleave(x.long().abs()),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.unique(x),
        lambda x: torch.isin(x, x),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_judge_sees_what_waits(waits: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError), never_waiting():
        waits(torch.randn(4))


PATHS: list[GradientPath] = ["sampled", "submatrix", "dense"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_steps_on_a_fixed_support_never_wait(path: GradientPath, dtype: torch.dtype) -> None:
    model, optimizer = trainer(path, dtype)
    train(model, optimizer, 1)
    with never_waiting():
        train(model, optimizer, 3)
    assert optimizer.engine.step == 4
    assert set(optimizer.engine.paths.values()) >= {path, "sampled"}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """A group of one process, whose collectives are real."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield Ranks(0, 1)
    dist.destroy_process_group()


def test_steps_that_exchange_gradients_never_wait(alone: Ranks) -> None:
    model, optimizer = trainer("sampled", ranks=alone)
    train(model, optimizer, 1)
    with never_waiting():
        train(model, optimizer, 2)
    averaging = optimizer.engine.averaging
    assert averaging is not None and not averaging.stopping
    averaging.wants_stop = True
    train(model, optimizer, 1)
    assert averaging.stopping
    reference, by_itself = trainer("sampled")
    train(reference, by_itself, 4)
    assert same(model, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_a_device_trains_what_a_cpu_does(
    path: GradientPath, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding; twice the very same; and weights are round(base + value) to the bit."""
    made = []
    for interpreted in (True, True, False):
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
        model, optimizer = trainer(path, dtype)
        train(model, optimizer, 3)
        made.append((model, optimizer))
    assert same(made[0][0], made[1][0])
    entries, reference = (each[1].engine.entries for each in made[1:])
    narrow = dtype != torch.float32  # a weight that rounds otherwise moves the next gradients
    torch.testing.assert_close(
        entries.values, reference.values, rtol=0, atol=2e-2 if narrow else 2e-5
    )
    untouched = dict(Net(dtype).named_parameters())
    for target in entries.targets:
        assert torch.equal(target.flat, merged(target, entries, untouched[target.name]))


@pytest.mark.parametrize("largest", [None, 0.05])
def test_a_gradient_that_is_not_finite_is_told_later_and_moves_nothing(
    largest: float | None,
) -> None:
    """Whoever asks for what was trained gets the error that a CPU raises at once."""
    model, optimizer = trainer("sampled")
    optimizer.engine.clipping.largest = largest
    train(model, optimizer, 2)
    optimizer.engine.clipping.check()
    for broken in (math.nan, math.inf):
        (model(TOKENS).sum() * broken).backward()
        optimizer.step()
    train(model, optimizer, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for ask in (optimizer.state_dict, optimizer.engine.clipping.check):
        with pytest.raises(TrainingError, match=r"step 2: the gradient .* not finite \(nan\)"):
            ask()


def test_a_tuner_tells_it_with_the_delta() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=12, seed=0))
    (model(torch.ones(2, 8)).sum() * math.inf).backward()
    tuner.step()
    with pytest.raises(TrainingError, match="step 0: the gradient"):
        tuner.delta()


@pytest.mark.parametrize("exp", [0.0, 1.3])
def test_a_device_selects_what_a_cpu_does(exp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entries in the same order, ties and all; a second offer is cut by the first."""
    torch.manual_seed(0)
    gradients = [torch.randint(-9, 9, (rows, 70)) / 8 for rows in (5, 40, 40)]
    weights = [torch.randn(gradient.numel()) for gradient in gradients]
    found = []
    for interpreted in (True, False):
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
        pools = Pools(D3(1.0, exp), [weight.numel() for weight in weights])
        pools.open(300)
        for number in (1, 0, 2):
            bounds = tuple(end.abs().item() for end in weights[number].abs().aminmax())
            pools.offer(number, gradients[number], weights[number], bounds, "w")
        found.append(pools.best(lambda number: np.zeros(0, np.int64)))
    for (tensor, *parts), (reference, *expected) in zip(*found, strict=True):
        assert tensor == reference
        assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_bias_corrections_are_those_of_the_table(
    beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltakit.training.optimizer import _bias

    ages = torch.tensor([1, 2, 3, 100, 10_000, 1_000_000])
    for dtype, rounding in ((torch.float32, 5e-7), (torch.float64, 1e-13)):
        found = _bias(beta, ages, torch.zeros(0, dtype=dtype))
        exact = [1 - beta**age for age in ages.tolist()]
        assert isinstance(found, torch.Tensor) and found.dtype == dtype
        torch.testing.assert_close(found, torch.tensor(exact, dtype=dtype), rtol=rounding, atol=0)


def test_the_switch_decides_who_works() -> None:
    assert dispatch.by_triton(torch.zeros(1)) == BY_TRITON
    assert dispatch.runs_ahead(torch.zeros(1))
