"""Child-Tuning-F: a random child network at every step, projected to a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.errors import ConfigError
from deltakit.gradient_hooks import on_gradient
from deltakit.selection.allocation import Allocation
from deltakit.selection.dense_phase import DensePhase, detached, initial_weights, trainable
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene, measuring
from deltakit.selection.static import Static


@HEURISTICS.register(
    "child-tuning-f", "weights that random child networks move most", "Child-Tuning, Xu et al. 2021"
)
@dataclass(frozen=True, kw_only=True)
class ChildTuningF(DensePhase):
    """|w - w_0| after training with random gradient masks (Xu et al. 2021, eq. 3-5, algorithm 1).

    At every step each gradient entry of the targets is kept with `probability` and divided by it,
    or else dropped, before AdamW sees it. The paper's result is dense; here the entries of largest
    change keep their values, and training goes on with them.
    """

    probability: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability must be in (0, 1], found {self.probability}")

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """The changes and their size."""
        model, calibration = scene.calibrated("child-tuning-f")
        with measuring(scene, model, extras=True):
            base = initial_weights(scene)
            weights = trainable(base)
            for weight in weights.values():
                on_gradient(weight, self._mask)
            groups = [{"params": list(weights.values())}]
            self.run(scene, model, calibration, weights.__getitem__, groups)
        deltas = {number: weight - base[number] for number, weight in detached(weights).items()}
        return Measurement(
            scores=lambda number: deltas[number].abs(),
            values=lambda number, indices: deltas[number][indices.to(deltas[number].device)],
        )

    def _mask(self, gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.rand_like(gradient) < self.probability
        return gradient * kept / self.probability


@METHODS.register(
    "child-tuning-f", "random child networks, projected", "Child-Tuning, Xu et al. 2021"
)
def child_tuning_f(
    *,
    budget: int,
    allocation: Allocation = "global",
    probability: float = 0.3,
    dense_steps: int | None = None,
    dense_fraction: float = 1.0,
    dense_lr: float = 5e-5,
    seed: int = 0,
) -> Static:
    """Child-Tuning-F, projection to the largest changes, training of those; see `ChildTuningF`."""
    heuristic = ChildTuningF(
        probability=probability,
        dense_steps=dense_steps,
        dense_fraction=dense_fraction,
        dense_lr=dense_lr,
        seed=seed,
    )
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
