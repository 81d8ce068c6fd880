"""Child-Tuning-D: a task-driven child network by Fisher information."""

from __future__ import annotations

from deltakit.selection.allocation import Allocation
from deltakit.selection.fisher import Fisher
from deltakit.selection.methods import METHODS
from deltakit.selection.static import Static


@METHODS.register(
    "child-tuning-d", "Fisher information over all training data", "Child-Tuning, Xu et al. 2021"
)
def child_tuning_d(
    *, budget: int, allocation: Allocation = "global", num_samples: int | None = None
) -> Static:
    """The child network of largest Fisher information (Xu et al. 2021, section 2.3, eq. 6-7).

    num_samples: training examples to measure with; None takes all, as the paper does.
    """
    fisher = Fisher(num_samples=num_samples)
    return Static(budget=budget, heuristic=fisher, allocation=allocation)
