"""The repeat strategy: the support is chosen anew at every selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError
from deltakit.selection.allocation import Allocation, allocate, parse_allocation
from deltakit.selection.heuristics import Heuristic, StepScore, resolve_heuristic
from deltakit.selection.methods import (
    METHODS,
    Change,
    Joining,
    Scene,
    Start,
    Support,
    check_budget,
    refuse_marks,
)
from deltakit.selection.pools import Pools, PoolSelector
from deltakit.selection.precondition import check_precondition
from deltakit.selection.schedules import check_selections, selecting_steps


@METHODS.register("repeat", "the support is chosen anew at every selection")
@dataclass(frozen=True, kw_only=True)
class Repeat:
    """The `budget` best entries of the day: chosen again at every selection, of all entries.

    restore: entries that drop out return to their base bits, so the budget holds at every step.
    Without it they keep the value they have and rest there, the overshooting form that Agarwal et
    al. (2024, ID3, section 3) compare with; the delta then holds more entries than the budget and
    says how many. An entry that comes back starts anew from its resting value.
    heuristic: one that scores gradients. every: steps from one selection to the next, the first
    being at step 0; no selection after the share `unmask_fraction` of all training steps, or after
    `steps` of them. allocation, precondition: see `Static`.
    """

    budget: int
    heuristic: str | Heuristic = "d3"
    every: int = 1
    steps: int | None = None
    restore: bool = True
    allocation: Allocation = "global"
    unmask_fraction: float = 1.0
    precondition: str = "none"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        parse_allocation(self.allocation)
        check_precondition(self.precondition)
        check_selections(self.every, self.unmask_fraction)
        self._score()

    def start(self, scene: Scene) -> Start:
        """No support yet, and a selector."""
        refuse_marks(scene, self.budget, "a support that is chosen anew")
        if scene.taken:
            raise BudgetError("a support that is chosen anew cannot continue from a delta")
        left = scene.left(self.budget)
        seats = allocate(self.allocation, scene.targets, scene.free(), left, scene.model)
        numels = [target.numel for target in scene.targets]
        last = selecting_steps(self.steps, self.unmask_fraction, scene.total_steps)
        pools = Pools(self._score(), numels, self.precondition)
        return Start(selector=Reselection(pools, left, seats, self.every, last, self.restore))

    def _score(self) -> StepScore:
        heuristic = resolve_heuristic(self.heuristic)
        if not isinstance(heuristic, StepScore):
            raise ConfigError(
                f"heuristic {self.heuristic!r} measures before training and gives the same answer "
                "again; repeat needs one that scores gradients, such as d3, gradient or snip"
            )
        return heuristic


class Reselection(PoolSelector):
    """The selector of the repeat strategy: all entries compete, those in training included."""

    competes = True

    def __init__(
        self,
        pools: Pools,
        budget: int,
        seats: Array | None,
        every: int,
        last: int | None,
        restores: bool,
    ) -> None:
        super().__init__(pools)
        self.restores = restores
        self._every, self._last = every, last
        self._counts: int | Sequence[int] = budget
        if seats is not None:
            self._counts = np.bincount(seats, minlength=pools.tensors).tolist()

    def scores_step(self, step: int) -> bool:
        """Every n-th step."""
        return step % self._every == 0 and (self._last is None or step < self._last)

    def begin(self, step: int, support: Support) -> None:
        """Open pools for the whole budget."""
        self._pools.open(self._counts)

    def choose(self, support: Support) -> Change:
        """Entries that are no longer among the best leave, new ones join."""
        best = {n: (i, g) for n, i, g in self._merged(self._pools.best(support.forbidden))}
        leaving, joining = [], []
        for number in range(self._pools.tensors):
            current = support.indices(number)
            none = (current[:0], torch.zeros(0))
            wanted, gradients = best.get(number, none)
            stays = torch.isin(wanted, current)
            left = current[~torch.isin(current, wanted)]
            if len(left):
                leaving.append((number, left))
            if not stays.all():
                joining.append((number, wanted[~stays], gradients[~stays]))
        return Change(leaving, joining)

    def _merged(self, chosen: list[Joining]) -> list[Joining]:
        """One item per tensor: the best scored ones, and those that only fill up."""
        merged = []
        for number in dict.fromkeys(n for n, _, _ in chosen):
            parts = [(i, g) for n, i, g in chosen if n == number]
            indices = torch.cat([i for i, _ in parts])
            merged.append((number, indices, torch.cat([g for _, g in parts])))
        return merged
