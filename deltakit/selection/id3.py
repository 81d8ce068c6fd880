"""ID3: incremental unmasking by the D3 score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakit.errors import BudgetError
from deltakit.selection.allocation import check_allocation, proportional_seats
from deltakit.selection.d3 import D3
from deltakit.selection.methods import METHODS, Candidate, Start, check_budget, check_room
from deltakit.selection.precondition import check_precondition
from deltakit.selection.schedules import Schedule, unmasking_plan
from deltakit.selection.unmask import Unmasking


@METHODS.register("id3", "incremental unmasking by D3", "ID3, Agarwal et al. 2024")
@dataclass(frozen=True, kw_only=True)
class ID3:
    """Incremental D3 (Agarwal et al. 2024, algorithm 1); the defaults are the paper's.

    budget: entries in all. steps: selection steps, from the first optimizer step on; None takes
    the share `unmask_fraction` of all training steps. eps, exp: of the D3 score. schedule:
    "uniform", "linear", "cosine", "once", a function (budget, step, steps) -> cumulative count,
    or counts per step. allocation: "global" compares all tensors; "proportional" shares each
    step's entries among tensors by size and compares within a tensor. precondition: "factored"
    scores the gradient divided by its factored root mean square, which keeps entries from crowding
    into few rows and columns (see `selection.precondition`); "none" is the paper's.
    """

    budget: int
    steps: int | None = None
    eps: float = 1.0
    exp: float = 0.0
    schedule: str | Schedule | Sequence[int] = "uniform"
    allocation: str = "global"
    unmask_fraction: float = 1.0
    precondition: str = "none"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_allocation(self.allocation)
        D3(self.eps, self.exp)
        check_precondition(self.precondition)
        if not 0 < self.unmask_fraction <= 1:
            raise BudgetError(f"unmask_fraction must be in (0, 1], found {self.unmask_fraction}")

    def selection_steps(self, total_steps: int | None) -> int:
        """Steps that unmask, given all training steps; BudgetError when neither is known."""
        if self.steps is not None:
            return self.steps
        if total_steps is None:
            raise BudgetError("ID3 needs steps=, the number of steps that unmask entries")
        return max(1, round(self.unmask_fraction * total_steps))

    def start(
        self,
        candidates: Sequence[Candidate],
        *,
        taken: int,
        total_steps: int | None,
        marks: Sequence[int],
    ) -> Start:
        """No support yet, and a selector for `selection_steps` steps."""
        free = [c.numel - len(c.blocked()) for c in candidates]
        left = check_room(self.budget, taken, sum(free))
        steps = self.selection_steps(total_steps)
        plan = unmasking_plan(self.schedule, left, steps, [m - taken for m in marks if m > taken])
        seats = proportional_seats(free, left) if self.allocation == "proportional" else None
        numels = [c.numel for c in candidates]
        score = D3(self.eps, self.exp)
        return Start(selector=Unmasking(score, plan, numels, seats, self.precondition))
