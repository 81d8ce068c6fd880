"""How far an entry travels that is unmasked late: its own age in Adam against one shared step.

    python benchmarks/late_entries.py

One weight trains from the first step, another joins at step t; the gradient is constant and the
learning rate 1, so an ideal entry moves by 1 per step. Reported per t: the first update, the
largest one, and the way over 40 steps against the ideal 40. Adam's betas are 0.9 and 0.999.
"""

from __future__ import annotations

import torch
from torch import nn

import deltakit as dk
from deltakit.training.optimizer import Age

STEPS = 40


class Two(nn.Module):
    """Two weights of which the loss is the sum; float64, so that nothing is lost to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return self.w.sum()


def updates(join: int, age: Age) -> list[float]:
    """The first 40 updates of an entry that joins at step `join`."""
    model = Two()
    counts = [1, *[0] * (join - 1), 1] if join else [2]
    method = dk.Increment(budget=2, heuristic="gradient", steps=max(1, join + 1), schedule=counts)
    tuner = dk.SparseTuner(model, method, lr=1.0, age=age)
    found = []
    for step in range(join + STEPS):
        before = model.w.detach()[1].item()
        model().backward()
        tuner.step()
        if step >= join:
            found.append(before - model.w.detach()[1].item())
    return found


def main() -> None:
    print(f"{'joins at':>9}{'age':>8}{'first':>9}{'largest':>9}{'way / ideal':>13}")
    ages: tuple[Age, ...] = ("shared", "entry")
    for join in (0, 10, 100, 1_000, 10_000):
        for age in ages:
            moves = updates(join, age)
            way = sum(moves) / STEPS
            print(f"{join:9,}{age:>8}{moves[0]:9.2f}{max(moves):9.2f}{way:13.2f}")


if __name__ == "__main__":
    main()
