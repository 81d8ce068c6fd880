"""Scores of gradients summed over calibration batches, for a selection before training."""

from __future__ import annotations

from dataclasses import dataclass

from deltakit.selection.allocation import Allocation
from deltakit.selection.gradient_passes import check_count, gradient_sums, widened
from deltakit.selection.heuristics import Measurement, StepScore
from deltakit.selection.scene import Scene, measuring
from deltakit.selection.static import Static


@dataclass(frozen=True)
class Calibrated:
    """A score of gradients, measured on the sum over `num_batches` training batches.

    seed: of the order of the batches.
    """

    heuristic: StepScore
    num_batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_batches", self.num_batches)

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores as the heuristic defines them; one dense gradient of the targets is kept."""
        model, calibration = scene.calibrated(type(self.heuristic).__name__)
        with measuring(scene, model):
            sums = gradient_sums(scene, model, calibration, self.num_batches, self.seed)
        targets = {t.number: t for t in scene.targets}
        return Measurement(lambda n: self.heuristic.score(sums[n], widened(targets[n].weights())))


def static_by_gradient(
    score: StepScore, budget: int, allocation: Allocation, num_batches: int | None, seed: int
) -> Static:
    """One selection by a score of gradients: the first step's, or the sum over some batches."""
    heuristic = score if num_batches is None else Calibrated(score, num_batches, seed)
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
