"""Incremental unmasking: which entries join the support at each selection step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltakit.dtypes import Array
from deltakit.parallel.ranks import Ranks
from deltakit.selection.heuristics import StepScore
from deltakit.selection.methods import Change, Part, Support
from deltakit.selection.pools import Pools, PoolSelector


class Unmasking(PoolSelector):
    """The selector of one incremental run.

    score: of entries. plan: cumulative number of entries after each selection, int64 [n]. numels:
    elements per tensor, in tensor order. seats: which tensor each entry of the budget belongs to,
    int [budget], or None where all tensors compete. precondition: see `Pools`. every: steps from
    one selection to the next; the first is at step 0.
    """

    def __init__(
        self,
        score: StepScore,
        plan: Array,
        numels: Sequence[int],
        seats: Array | None = None,
        precondition: str = "none",
        every: int = 1,
    ) -> None:
        super().__init__(Pools(score, numels, precondition))
        self.plan = plan
        self._every = every
        self._seats = seats
        self._tensors = len(numels)

    def split(self, ranks: Ranks, parts: Sequence[Part]) -> None:
        """Choose the best entries of all processes' parts."""
        self._pools.split(ranks, parts)

    def scores_step(self, step: int) -> bool:
        """Every n-th step, until the plan is done."""
        return step % self._every == 0 and step // self._every < len(self.plan)

    def begin(self, step: int, support: Support) -> None:
        """Open the pools of the selection at `step`."""
        number = step // self._every
        start, stop = int(self.plan[number - 1]) if number else 0, int(self.plan[number])
        if self._seats is None:
            self._pools.open(stop - start)
        else:
            self._pools.open(np.bincount(self._seats[start:stop], minlength=self._tensors).tolist())

    def choose(self, support: Support) -> Change:
        """The entries that join now, exactly as many as planned."""
        return Change(joining=self._pools.best(support.blocked))
