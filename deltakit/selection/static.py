"""The static strategy: one selection, before or at the first step, and a fixed support after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.selection.allocation import Allocation, allocate, parse_allocation
from deltakit.selection.heuristics import Heuristic, Measure, resolve_heuristic
from deltakit.selection.methods import METHODS, Scene, Start, check_budget, refuse_marks
from deltakit.selection.precondition import check_precondition
from deltakit.selection.ranking import rank, support_of
from deltakit.selection.unmask import Unmasking


@METHODS.register("static", "one selection, then a fixed support")
@dataclass(frozen=True, kw_only=True)
class Static:
    """The `budget` entries that a heuristic scores highest, chosen once.

    heuristic: a registered name or an object; one that scores gradients takes those of the first
    step (accumulated over its micro-batches), one that measures does so before it. allocation:
    see `selection.allocation`. precondition: of step gradients, see `selection.precondition`.
    """

    budget: int
    heuristic: str | Heuristic = "d3"
    allocation: Allocation = "global"
    precondition: str = "none"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        parse_allocation(self.allocation)
        check_precondition(self.precondition)
        resolve_heuristic(self.heuristic)

    def start(self, scene: Scene) -> Start:
        """The support of a measured heuristic, or a selector for the first step."""
        refuse_marks(scene, self.budget, "a static support")
        left = scene.left(self.budget)
        seats = allocate(self.allocation, scene.targets, scene.free(), left, scene.model)
        heuristic = resolve_heuristic(self.heuristic)
        if isinstance(heuristic, Measure):
            measurement = heuristic.measure(scene, left)
            owners, indices = rank(measurement, scene, left, seats)
            return Start(support_of(owners, indices, measurement), frozen=measurement.frozen)
        numels = [target.numel for target in scene.targets]
        plan = np.array([left], np.int64)
        return Start(selector=Unmasking(heuristic, plan, numels, seats, self.precondition))
