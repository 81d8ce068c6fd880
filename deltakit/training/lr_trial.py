"""One short trial of a learning rate, which leaves model and random numbers as they were."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltakit.errors import TrainingError
from deltakit.quantized.stand_in import whole_parameters
from deltakit.training.tuner import SparseTuner

MakeTuner = Callable[[float, int], SparseTuner]
Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
Support = dict[str, torch.Tensor]
_DIVERGED = 3.0  # times the first training loss


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one rate. losses: the training loss of each step, in nats. held_out: the loss of
    each held-out batch after the last step, without dropout; empty where training diverged."""

    rate: float
    losses: tuple[float, ...]
    held_out: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean held-out loss; infinite where training diverged."""
        return sum(self.held_out) / len(self.held_out) if self.held_out else math.inf


def run_trial(
    make_tuner: MakeTuner,
    rate: float,
    steps: Sequence[Sequence[Any]],
    held_out: Sequence[Any],
    loss: Loss,
    *,
    seed: int,
) -> tuple[Trial, Support]:
    """Train at `rate`, falling linearly to zero, and measure; all weights and buffers go back.

    make_tuner: (rate, number of steps) -> a tuner on the model at its start. steps: per optimizer
    step its micro-batches; held_out: batches that no step sees. seed: of dropout, the same for
    every trial. The support that was trained comes back too: live parameter name -> flat indices.
    """
    tuner = make_tuner(rate, len(steps))
    with _undone(tuner):
        torch.manual_seed(seed)
        losses = _train(tuner, steps, loss)
        measured: tuple[float, ...] = ()
        if len(losses) == len(steps):
            measured = _measure(tuner.model, held_out, loss)
        targets = tuner.engine.entries.targets
        support = {t.live_name: t.indices.clone() for t in targets if len(t.indices)}
    finite = all(math.isfinite(value) for value in measured)
    return Trial(rate, tuple(losses), measured if finite else ()), support


def density_of(make_tuner: MakeTuner, steps: int) -> float:
    """Entries of the budget over weights of the model."""
    tuner = make_tuner(1.0, steps)
    with _undone(tuner):
        return tuner.budget / sum(p.numel() for p in whole_parameters(tuner.model).values())


def _train(tuner: SparseTuner, steps: Sequence[Sequence[Any]], loss: Loss) -> list[float]:
    """The training loss of each step; fewer than `steps` where it diverged."""
    rates = [group["lr"] for group in tuner.optimizer.param_groups]
    losses: list[float] = []
    tuner.model.train()
    for number, batches in enumerate(steps):
        for group, rate in zip(tuner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - number / len(steps))
        try:
            total = _step(tuner, batches, loss)
        except TrainingError:
            if not losses:  # no rate has acted yet
                raise
            break  # a gradient is not finite
        losses.append(total)
        if not total <= _DIVERGED * losses[0]:
            return losses[:number]
    return losses


def _step(tuner: SparseTuner, batches: Sequence[Any], loss: Loss) -> float:
    total = 0.0
    for batch in batches:
        part = loss(tuner.model, batch) / len(batches)
        torch.autograd.backward(part)
        total += part.item()
    tuner.step()
    tuner.engine.clipping.check()
    return total


@torch.no_grad()
def _measure(model: torch.nn.Module, batches: Sequence[Any], loss: Loss) -> tuple[float, ...]:
    model.eval()
    return tuple(loss(model, batch).item() for batch in batches)


@contextmanager
def _undone(tuner: SparseTuner) -> Iterator[None]:
    """Put weights, extras, buffers, modes, flags and random generators back."""
    model, engine = tuner.model, tuner.engine
    kept = [*(e.parameter for e in engine.extras), *model.buffers()]
    before = [(tensor, tensor.detach().clone()) for tensor in kept]
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            engine.entries.restore()
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            for module, mode in modes:
                module.training = mode
            tuner.close()
