"""Drop and grow: a support that starts at random and keeps exchanging its least useful entries."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch

from deltakit.errors import BudgetError, ConfigError
from deltakit.selection.allocation import Allocation, allocate, parse_allocation
from deltakit.selection.heuristics import Heuristic, StepScore, resolve_heuristic
from deltakit.selection.methods import (
    METHODS,
    Change,
    Scene,
    Start,
    Support,
    check_budget,
    refuse_marks,
)
from deltakit.selection.pools import Pools, PoolSelector
from deltakit.selection.random_mask import draw
from deltakit.selection.schedules import check_selections, selecting_steps


@METHODS.register(
    "drop-and-grow", "a random support that exchanges its smallest deltas", "SpIEL, Ansell 2024"
)
@dataclass(frozen=True, kw_only=True)
class DropAndGrow:
    """SpIEL (Ansell et al. 2024, algorithm 1), RigL (Evci et al. 2020) on deltas.

    The support starts at random. At every exchange, of each tensor's entries the share r_t with
    the smallest |value| is dropped and returns to its base bits, and as many of the highest score
    join: |g| by default. Budgets per tensor never change. r_t falls from `rate` to zero over
    the exchanges, "linear" or "cosine" (`decay`); the first exchange takes the share `first_rate`,
    1 in SpIEL, where the random start is only a placeholder.
    every: steps between exchanges, the first of which comes at step `every`; the last before the
    share `unmask_fraction` of all steps, or `steps`. allocation: shares the budget among tensors.
    """

    budget: int
    heuristic: str | Heuristic = "gradient"
    every: int = 20
    rate: float = 0.2
    first_rate: float = 1.0
    decay: str = "linear"
    steps: int | None = None
    unmask_fraction: float = 1.0
    allocation: Allocation = "proportional"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_selections(self.every, self.unmask_fraction)
        if parse_allocation(self.allocation) == "global":
            raise ConfigError(
                "drop-and-grow keeps a budget per tensor; allocation cannot be global"
            )
        if self.decay not in ("linear", "cosine"):
            raise ConfigError(f"decay must be linear or cosine, found {self.decay!r}")
        for name in ("rate", "first_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], found {getattr(self, name)}")
        if not isinstance(resolve_heuristic(self.heuristic), StepScore):
            raise ConfigError(f"heuristic {self.heuristic!r} does not score gradients")

    def start(self, scene: Scene) -> Start:
        """A random support, and a selector that exchanges entries."""
        refuse_marks(scene, self.budget, "the size of a drop-and-grow support")
        if scene.taken:
            raise BudgetError("drop-and-grow cannot continue from a delta")
        left, free = scene.left(self.budget), scene.free()
        seats = allocate(self.allocation, scene.targets, free, left, scene.model)
        assert seats is not None
        counts = np.bincount(seats, minlength=len(free)).tolist()
        score = resolve_heuristic(self.heuristic)
        assert isinstance(score, StepScore)
        pools = Pools(score, [target.numel for target in scene.targets])
        last = selecting_steps(self.steps, self.unmask_fraction, scene.total_steps)
        if last is None:
            raise BudgetError("steps= is missing, the number of steps with exchanges")
        drawn = zip(scene.targets, counts, strict=True)
        support = [draw(self.seed, target, count) for target, count in drawn if count]
        return Start(support, Exchange(self, pools, counts, last))


class Exchange(PoolSelector):
    """The selector of drop-and-grow."""

    def __init__(self, method: DropAndGrow, pools: Pools, counts: list[int], last: int) -> None:
        super().__init__(pools)
        self._method, self._counts, self._last = method, counts, last
        self._shares: list[int] = []

    def scores_step(self, step: int) -> bool:
        """Every n-th step but the first of all."""
        return 0 < step < self._last and step % self._method.every == 0

    def begin(self, step: int, support: Support) -> None:
        """Open a pool per tensor for what will join."""
        rate = self._rate(step)
        room = [n - len(support.blocked(t)) for t, n in enumerate(self._pools.numels)]
        counts = [round(rate * count) for count in self._counts]
        self._shares = [min(*pair) for pair in zip(counts, room, strict=True)]
        self._pools.open(self._shares)

    def choose(self, support: Support) -> Change:
        """Of each tensor the smallest |value| leave, ties to the higher index, and others join."""
        leaving = []
        for number, share in enumerate(self._shares):
            if share:
                indices, order = support.indices(number).sort(descending=True)
                size = support.values(number)[order].abs()
                dropped = torch.sort(size, stable=True).indices[:share]
                leaving.append((number, indices[dropped]))
        return Change(leaving, self._pools.best(support.blocked))

    def _rate(self, step: int) -> float:
        method = self._method
        if step == method.every:
            return method.first_rate
        x = step / self._last
        fall = 1 - x if method.decay == "linear" else (1 + cos(pi * x)) / 2
        return method.rate * fall
