"""U-BitFit: single bias entries, chosen by the first-order change of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.selection.biases import OnBiases
from deltakit.selection.calibrated import Calibrated
from deltakit.selection.heuristics import HEURISTICS
from deltakit.selection.methods import METHODS
from deltakit.selection.snip import least_gradient_of_product
from deltakit.selection.static import Static


@HEURISTICS.register("u-bitfit", "weights that the gradient lets grow", "Lawton et al. 2023")
@dataclass(frozen=True, slots=True)
class UBitFit:
    """max(0, -w * g), the first-order rise of the loss when w is taken away (Lawton et al. 2023).

    Entries of negative score are not worth choosing. The score fits any tensor; the method
    `u-bitfit` applies it to biases.
    """

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scores of entries: gradient [n], weight [n] of any floating dtype -> float32 [n]."""
        return (-weight.float() * gradient.float()).clamp(min=0)

    def least_gradient(self, score: float, smallest: float, largest: float) -> float:
        """The gradient that the score needs on the largest weight."""
        return least_gradient_of_product(score, largest)


@METHODS.register("u-bitfit", "single bias entries", "Lawton et al. 2023")
def u_bitfit(*, budget: int, num_batches: int = 1, seed: int = 0) -> Static:
    """The bias entries of highest first-order score (Lawton et al. 2023, unstructured NAS).

    num_batches: training batches whose gradients are summed, without dropout. seed: of their order.
    """
    return Static(budget=budget, heuristic=OnBiases(Calibrated(UBitFit(), num_batches, seed)))
