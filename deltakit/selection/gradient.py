"""The gradient's magnitude, the plainest score of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.selection.allocation import Allocation
from deltakit.selection.calibrated import static_by_gradient
from deltakit.selection.heuristics import HEURISTICS
from deltakit.selection.methods import METHODS
from deltakit.selection.static import Static


@HEURISTICS.register("gradient", "large gradient", "SIFT, Song et al. 2024")
@dataclass(frozen=True, slots=True)
class Gradient:
    """|g|, in float32."""

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scores of entries: gradient [n], weight [n] of any floating dtype -> float32 [n]."""
        return gradient.float().abs()

    def least_gradient(self, score: float, smallest: float, largest: float) -> float:
        """The score itself."""
        return score


@METHODS.register("sift", "largest gradients of each tensor", "SIFT, Song et al. 2024")
def sift(
    *,
    budget: int,
    allocation: Allocation = "proportional",
    num_batches: int | None = None,
    seed: int = 0,
) -> Static:
    """The largest |g| of every tensor, by default in proportion to size (Song et al. 2024).

    num_batches: batches whose gradients are summed before training; None takes the first step's.
    """
    return static_by_gradient(Gradient(), budget, allocation, num_batches, seed)
