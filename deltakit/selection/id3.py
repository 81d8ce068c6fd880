"""ID3: incremental unmasking by the D3 score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakit.selection.allocation import Allocation
from deltakit.selection.d3 import D3
from deltakit.selection.increment import Increment
from deltakit.selection.methods import METHODS, Scene, Start
from deltakit.selection.schedules import Schedule


@METHODS.register("id3", "incremental unmasking by D3", "ID3, Agarwal et al. 2024")
@dataclass(frozen=True, kw_only=True)
class ID3:
    """Incremental D3 (Agarwal et al. 2024, algorithm 1); the defaults are the paper's.

    eps, exp: of the D3 score (`D3`). All else is `Increment`'s: budget, steps, every, schedule,
    allocation, unmask_fraction, precondition. "proportional" allocation shares each step's entries
    among tensors by size, and precondition "factored" keeps entries from crowding into few rows
    and columns; both depart from the paper.
    """

    budget: int
    steps: int | None = None
    eps: float = 1.0
    exp: float = 0.0
    every: int = 1
    schedule: str | Schedule | Sequence[int] = "uniform"
    allocation: Allocation = "global"
    unmask_fraction: float = 1.0
    precondition: str = "none"

    def __post_init__(self) -> None:
        self._strategy()

    def start(self, scene: Scene) -> Start:
        """No support yet, and a selector for the first steps."""
        return self._strategy().start(scene)

    def _strategy(self) -> Increment:
        return Increment(
            budget=self.budget,
            heuristic=D3(self.eps, self.exp),
            steps=self.steps,
            every=self.every,
            schedule=self.schedule,
            allocation=self.allocation,
            unmask_fraction=self.unmask_fraction,
            precondition=self.precondition,
        )
