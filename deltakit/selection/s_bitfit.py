"""S-BitFit: whole bias vectors, chosen by the first-order change of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.selection.biases import bias_scene, never_elsewhere
from deltakit.selection.gradient_passes import check_count, gradient_sums, widened
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene, measuring
from deltakit.selection.static import Static


@HEURISTICS.register("s-bitfit", "bias vectors by first-order score", "Lawton et al. 2023")
@dataclass(frozen=True)
class SBitFit:
    """The sum of -b * g over a bias vector (Lawton et al. 2023, structured NAS).

    Every entry of a vector carries its vector's score, so whole vectors are chosen, and only the
    last is cut by an exact budget. Other tensors score -inf; the allocation must be "global".
    num_batches: training batches whose gradients are summed, without dropout. seed: of their order.
    """

    num_batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_batches", self.num_batches)

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """One score per bias vector; BudgetError for more entries than biases hold."""
        model, calibration = scene.calibrated("s-bitfit")
        biases = bias_scene(scene, budget)
        with measuring(biases, model):
            sums = gradient_sums(biases, model, calibration, self.num_batches, self.seed)
        weights = {t.number: t.parameter for t in biases.targets}

        def scores(number: int) -> torch.Tensor:
            total = -(widened(weights[number]).double() @ sums[number].double())
            return torch.full_like(sums[number], total.item())

        return Measurement(never_elsewhere(scene, biases, scores))


@METHODS.register("s-bitfit", "whole bias vectors", "Lawton et al. 2023")
def s_bitfit(*, budget: int, num_batches: int = 1, seed: int = 0) -> Static:
    """The bias vectors of highest first-order score (Lawton et al. 2023); see `SBitFit`."""
    return Static(budget=budget, heuristic=SBitFit(num_batches, seed))
