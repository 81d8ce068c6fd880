"""SAM, the second-order approximation method: largest squared gradient."""

from __future__ import annotations

from dataclasses import dataclass

from deltakit.selection.allocation import Allocation
from deltakit.selection.calibrated import static_by_gradient
from deltakit.selection.gradient import Gradient
from deltakit.selection.heuristics import HEURISTICS
from deltakit.selection.methods import METHODS
from deltakit.selection.static import Static


@HEURISTICS.register("sam", "large squared gradient", "SAM, Fu et al. 2023")
@dataclass(frozen=True, slots=True)
class SAM(Gradient):
    """g^2 (Fu et al. 2023, theorem 3), scored as |g|.

    Minimising the loss's second-order approximation with a common curvature gives the entries of
    largest g^2. The square root keeps the order, and unlike the square it neither underflows below
    |g| = 1e-23 nor overflows, so the order is exact.
    """


@METHODS.register("sam", "largest squared gradients of all", "SAM, Fu et al. 2023")
def sam(
    *,
    budget: int,
    allocation: Allocation = "global",
    num_batches: int | None = None,
    seed: int = 0,
) -> Static:
    """Second-order approximation method (Fu et al. 2023, algorithm 1).

    num_batches: batches whose gradients are summed before training; None takes the first step's.
    """
    return static_by_gradient(SAM(), budget, allocation, num_batches, seed)
