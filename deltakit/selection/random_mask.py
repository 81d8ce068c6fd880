"""Random masking: a support that never looks at a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltakit.errors import BudgetError
from deltakit.formats.seeded import seeded_support
from deltakit.selection.allocation import proportional_counts
from deltakit.selection.methods import METHODS, Candidate, Chosen, Start, check_budget, check_room


@METHODS.register("random", "a fixed random support", "random masking, Xu and Zhang 2024")
@dataclass(frozen=True, kw_only=True)
class RandomMask:
    """A random support of exactly `budget` entries (Xu and Zhang 2024), fixed before training.

    The budget is shared among tensors in proportion to size; within a tensor every support of
    that many entries is equally likely, and tensors differ although they share one seed. A file
    stores generator and seed, no indices.
    """

    budget: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def start(
        self,
        candidates: Sequence[Candidate],
        *,
        taken: int,
        total_steps: int | None,
        marks: Sequence[int],
    ) -> Start:
        """The whole support; BudgetError for budget checkpoints, which a fixed support lacks."""
        if [m for m in marks if m < self.budget]:
            raise BudgetError(
                "a random mask is fixed from the start and has no budget checkpoints; truncate "
                "the trained delta instead"
            )
        free = [c.numel - len(c.blocked()) for c in candidates]
        counts = proportional_counts(free, check_room(self.budget, taken, sum(free)))
        drawn = zip(candidates, counts, strict=True)
        return Start(support=[self._draw(n, c, k) for n, (c, k) in enumerate(drawn) if k])

    def _draw(self, number: int, candidate: Candidate, count: int) -> Chosen:
        blocked = candidate.blocked()
        ranks = seeded_support(self.seed, candidate.name, candidate.numel - len(blocked), count)
        if not len(blocked):
            return Chosen(number, ranks, self.seed)
        # The r-th free index is r plus the number of blocked indices at or below it.
        gaps = blocked - np.arange(len(blocked))
        return Chosen(number, ranks + np.searchsorted(gaps, ranks, side="right"))
