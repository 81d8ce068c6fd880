"""Diff pruning: a delta under hard-concrete gates, projected to a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.gradient_hooks import on_gradient
from deltakit.selection.allocation import Allocation
from deltakit.selection.dense_phase import DensePhase, initial_weights
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene, measuring
from deltakit.selection.static import Static

STRETCH = 1.5  # gates are stretched to (-1.5, 1.5) and clamped to [0, 1]
FIRST_LOGIT = 5.0


@HEURISTICS.register("diff-pruning", "large gated changes", "diff pruning, Guo et al. 2021")
@dataclass(frozen=True, kw_only=True)
class DiffPruning(DensePhase):
    """|z * v| after training w_0 + z * v with hard-concrete gates z (Guo et al. 2021, section 3.1).

    Gates are sampled as min(1, max(0, 3 sigmoid(log u - log(1 - u) + a) - 1.5)), with a = 5 at
    first and a rate of `gate_lr`; their expected number, the sum of sigmoid(a), is penalised by
    `penalty` (1.25e-7 in the paper). The deltas of largest magnitude, with gates at u = 1/2, keep
    their values (section 3.2), and training goes on with them. The structured gates per tensor are
    left out.
    """

    gate_lr: float = 0.1
    penalty: float = 1.25e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_lr <= 0 or self.penalty < 0:
            raise ConfigError(
                "gate_lr must be above 0 and penalty at least 0, found "
                f"{self.gate_lr} and {self.penalty}"
            )

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """The gated deltas and their size."""
        model, calibration = scene.calibrated("diff-pruning")
        with measuring(scene, model, extras=True):
            base = initial_weights(scene)
            values = {n: torch.zeros_like(w).requires_grad_() for n, w in base.items()}
            logits = {n: torch.full_like(w, FIRST_LOGIT).requires_grad_() for n, w in base.items()}
            for logit in logits.values():
                on_gradient(logit, partial(self._penalised, logit))

            def weight(number: int) -> torch.Tensor:
                noise = torch.rand_like(base[number]).clamp(1e-6, 1 - 1e-6).logit()
                return base[number] + _gate(logits[number] + noise) * values[number]

            groups: list[dict[str, Any]] = [
                {"params": list(values.values())},
                {"params": list(logits.values()), "lr": self.gate_lr},
            ]
            self.run(scene, model, calibration, weight, groups)
        deltas = {n: _gate(logits[n].detach()) * value.detach() for n, value in values.items()}
        return Measurement(
            scores=lambda number: deltas[number].abs(),
            values=lambda number, indices: deltas[number][indices.to(deltas[number].device)],
        )

    def _penalised(self, logit: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + self._penalty_gradient(logit)

    def _penalty_gradient(self, logit: torch.Tensor) -> torch.Tensor:
        likely = logit.detach().sigmoid()
        return self.penalty * likely * (1 - likely)


def _gate(logit: torch.Tensor) -> torch.Tensor:
    return (logit.sigmoid() * (2 * STRETCH) - STRETCH).clamp(0, 1)


@METHODS.register("diff-pruning", "gated deltas, projected", "diff pruning, Guo et al. 2021")
def diff_pruning(
    *,
    budget: int,
    allocation: Allocation = "global",
    penalty: float = 1.25e-7,
    dense_steps: int | None = None,
    dense_fraction: float = 1.0,
    dense_lr: float = 5e-5,
    seed: int = 0,
) -> Static:
    """Gated training, projection to the largest deltas, training of those; see `DiffPruning`."""
    heuristic = DiffPruning(
        penalty=penalty,
        dense_steps=dense_steps,
        dense_fraction=dense_fraction,
        dense_lr=dense_lr,
        seed=seed,
    )
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
