"""The incremental strategy: entries join on a schedule and stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError
from deltakit.parallel.ranks import Ranks
from deltakit.selection.allocation import Allocation, allocate, parse_allocation
from deltakit.selection.heuristics import Heuristic, Measure, resolve_heuristic
from deltakit.selection.methods import (
    METHODS,
    Change,
    Part,
    Scene,
    Selector,
    Start,
    Support,
    check_budget,
)
from deltakit.selection.precondition import check_precondition
from deltakit.selection.ranking import rank, support_of
from deltakit.selection.schedules import (
    Schedule,
    check_selections,
    selecting_steps,
    unmasking_plan,
)
from deltakit.selection.unmask import Unmasking


@METHODS.register("increment", "entries join on a schedule and stay")
@dataclass(frozen=True, kw_only=True)
class Increment:
    """Entries join until there are `budget`, the best of the day at each selection.

    heuristic: a registered name or an object; one that scores gradients takes those of the
    selection's own step, one that measures does so once, before training, and its ranking is
    followed. every: steps from one selection to the next, the first being at step 0. steps: how
    many steps that takes, from the first on; None takes the share `unmask_fraction` of all
    training steps. schedule: "uniform", "linear", "cosine", "once", a function (budget, selection,
    selections) -> cumulative count, or counts per selection. allocation, precondition: see
    `Static`.
    """

    budget: int
    heuristic: str | Heuristic = "d3"
    steps: int | None = None
    every: int = 1
    schedule: str | Schedule | Sequence[int] = "uniform"
    allocation: Allocation = "global"
    unmask_fraction: float = 1.0
    precondition: str = "none"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        parse_allocation(self.allocation)
        check_precondition(self.precondition)
        resolve_heuristic(self.heuristic)
        check_selections(self.every, self.unmask_fraction)

    def start(self, scene: Scene) -> Start:
        """No support yet, and a selector for `selections` selections."""
        left = scene.left(self.budget)
        count = self.selections(scene.total_steps)
        marks = [mark - scene.taken for mark in scene.marks if mark > scene.taken]
        plan = unmasking_plan(self.schedule, left, count, marks)
        seats = allocate(self.allocation, scene.targets, scene.free(), left, scene.model)
        heuristic = resolve_heuristic(self.heuristic)
        if isinstance(heuristic, Measure):
            measurement = heuristic.measure(scene, left)
            owners, indices = rank(measurement, scene, left, seats)
            if measurement.frozen or measurement.values is not None:
                return Start(support_of(owners, indices, measurement), frozen=measurement.frozen)
            return Start(selector=Following(owners, indices, plan, self.every))
        numels = [target.numel for target in scene.targets]
        unmasking = Unmasking(heuristic, plan, numels, seats, self.precondition, self.every)
        return Start(selector=unmasking)

    def selections(self, total_steps: int | None) -> int:
        """How many selections there are, given all training steps; BudgetError if unknown."""
        steps = selecting_steps(self.steps, self.unmask_fraction, total_steps)
        if steps is None:
            raise BudgetError(
                "steps= is missing, the number of steps that unmask entries, and the number "
                "of training steps is not known either"
            )
        return -(-steps // self.every)


class Following(Selector):
    """The selector of a ranking made before training: its next entries join at each selection."""

    def __init__(
        self, owners: torch.Tensor, indices: torch.Tensor, plan: Array, every: int
    ) -> None:
        self._owners, self._indices = owners, indices
        self._plan, self._every = plan, every

    def split(self, ranks: Ranks, parts: Sequence[Part]) -> None:
        """Nothing changes: the ranking is that of whole tensors, and the same on all processes."""

    def ahead(self, step: int, support: Support) -> Change | None:
        """The entries whose turn it is."""
        number = step // self._every
        if step % self._every or number >= len(self._plan):
            return None
        part = slice(int(self._plan[number - 1]) if number else 0, int(self._plan[number]))
        owners, indices = self._owners[part], self._indices[part]
        joining = []
        for tensor in torch.unique(owners).tolist():
            mine = indices[owners == tensor]
            joining.append((tensor, mine, torch.zeros(len(mine))))
        return Change(joining=joining)
