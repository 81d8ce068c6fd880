"""Random masking: a support that never looks at a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.errors import ConfigError
from deltakit.formats.seeded import seeded_support
from deltakit.selection.allocation import Allocation, allocate, parse_allocation
from deltakit.selection.methods import (
    METHODS,
    Candidate,
    Chosen,
    Scene,
    Start,
    check_budget,
    refuse_marks,
)


@METHODS.register("random", "a fixed random support", "random masking, Xu and Zhang 2024")
@dataclass(frozen=True, kw_only=True)
class RandomMask:
    """A random support of exactly `budget` entries (Xu and Zhang 2024), fixed before training.

    The budget is shared among tensors by `allocation` (see `selection.allocation`; "erdos-renyi" is
    the random criterion of that name); within a tensor every support of that many entries is
    equally likely, and tensors differ although they share one seed. A file stores generator and
    seed, no indices.
    """

    budget: int
    seed: int = 0
    allocation: Allocation = "proportional"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if parse_allocation(self.allocation) == "global":
            raise ConfigError(
                "method random has no scores by which tensors could compete, so allocation global "
                "means nothing here; take proportional, uniform, erdos-renyi or shares"
            )

    def start(self, scene: Scene) -> Start:
        """The whole support; BudgetError for budget checkpoints, which a fixed support lacks."""
        refuse_marks(scene, self.budget, "a random mask")
        left = scene.left(self.budget)
        seats = allocate(self.allocation, scene.targets, scene.free(), left, scene.model)
        counts = np.bincount(np.asarray(seats), minlength=len(scene.targets)).tolist()
        drawn = zip(scene.targets, counts, strict=True)
        return Start(support=[draw(self.seed, target, k) for target, k in drawn if k])


def draw(seed: int, target: Candidate, count: int) -> Chosen:
    """`count` of a target's free entries, every choice equally likely."""
    blocked = target.blocked()
    ranks = seeded_support(seed, target.name, target.numel - len(blocked), count)
    if not len(blocked):
        return Chosen(target.number, ranks, seed)
    # The r-th free index is r plus the number of blocked indices at or below it.
    gaps = blocked - np.arange(len(blocked))
    return Chosen(target.number, ranks + np.searchsorted(gaps, ranks, side="right"))
