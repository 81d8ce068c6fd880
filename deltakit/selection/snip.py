"""SNIP: connection sensitivity."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from deltakit.selection.allocation import Allocation
from deltakit.selection.calibrated import static_by_gradient
from deltakit.selection.heuristics import HEURISTICS
from deltakit.selection.methods import METHODS
from deltakit.selection.static import Static
from deltakit.selection.topk import SMALLEST


def least_gradient_of_product(score: float, largest: float) -> float:
    """A lower bound on |g| where a float32 product |g| |w| is at least `score`, |w| <= largest.

    Leaves room for rounding: relative, and of one step among subnormal products.
    """
    if largest == 0:
        return inf
    return max(0.0, score * (1 - 1e-5) - SMALLEST) / largest


@HEURISTICS.register("snip", "large product of gradient and weight", "SNIP, Lee et al. 2019")
@dataclass(frozen=True, slots=True)
class Snip:
    """|g w|, the sensitivity of the loss to removing a connection (Lee et al. 2019, eq. 4-5).

    The paper divides by the sum over all entries, which keeps the order.
    """

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scores of entries: gradient [n], weight [n] of any floating dtype -> float32 [n]."""
        return (gradient.float() * weight.float()).abs()

    def least_gradient(self, score: float, smallest: float, largest: float) -> float:
        """The gradient that the score needs on the largest weight."""
        return least_gradient_of_product(score, largest)


@METHODS.register("snip", "largest connection sensitivity", "SNIP, Lee et al. 2019")
def snip(
    *,
    budget: int,
    allocation: Allocation = "global",
    num_batches: int | None = None,
    seed: int = 0,
) -> Static:
    """The entries of largest |g w| (Lee et al. 2019, algorithm 1).

    num_batches: batches whose gradients are summed before training; None takes the first step's.
    """
    return static_by_gradient(Snip(), budget, allocation, num_batches, seed)
