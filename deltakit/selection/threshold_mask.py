"""Threshold masks: learning which weights to set to zero, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.selection.allocation import Allocation
from deltakit.selection.dense_phase import DensePhase, initial_weights
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene, measuring
from deltakit.selection.static import Static

FIRST_SCORE, THRESHOLD = 1e-2, 5e-3  # of Piggyback, Mallya et al. 2018


@HEURISTICS.register("threshold-mask", "weights that a learnt mask removes", "Zhao et al. 2020")
@dataclass(frozen=True, kw_only=True)
class ThresholdMask(DensePhase):
    """Binary masks instead of fine-tuning (Zhao et al. 2020, eq. 2-4).

    Every weight has a real score s; training multiplies the weight by 1 where s is at least a
    threshold and by 0 elsewhere, and passes the mask's gradient straight through to s. The weights
    are fixed throughout. The `budget` weights of lowest score are set to zero, and stay there.
    dense_lr: of the scores, which start 5e-3 above the threshold.
    """

    dense_lr: float = 1e-3

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """The lowest scores; the values that turn a weight into +0.0, frozen."""
        model, calibration = scene.calibrated("threshold-mask")
        with measuring(scene, model, extras=True):
            base = initial_weights(scene)
            scores = {n: torch.full_like(w, FIRST_SCORE).requires_grad_() for n, w in base.items()}

            def weight(number: int) -> torch.Tensor:
                score = scores[number]
                straight = score - score.detach()  # zero, with the gradient of the score
                return base[number] * ((score.detach() >= THRESHOLD) + straight)

            groups = [{"params": list(scores.values())}]
            self.run(scene, model, calibration, weight, groups)
        return Measurement(
            scores=lambda number: -scores[number].detach(),
            values=lambda number, indices: -base[number][indices.to(base[number].device)],
            frozen=True,
        )


@METHODS.register("threshold-mask", "a learnt mask that zeroes weights", "Zhao et al. 2020")
def threshold_mask(
    *,
    budget: int,
    allocation: Allocation = "global",
    dense_steps: int | None = None,
    dense_fraction: float = 1.0,
    dense_lr: float = 1e-3,
    seed: int = 0,
) -> Static:
    """Sets `budget` weights to zero, chosen by a learnt mask; see `ThresholdMask`."""
    heuristic = ThresholdMask(
        dense_steps=dense_steps, dense_fraction=dense_fraction, dense_lr=dense_lr, seed=seed
    )
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
