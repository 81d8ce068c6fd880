"""Bernoulli masking: every entry is trained with the same probability."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from deltakit.errors import BudgetError, ConfigError
from deltakit.formats.seeded import philox_words
from deltakit.selection.fixed import FixedSupport
from deltakit.selection.methods import METHODS, Scene, check_budget
from deltakit.selection.random_mask import draw

_PART = 2**20  # words drawn at a time


@METHODS.register(
    "bernoulli", "each entry with one probability", "random masking, Xu and Zhang 2024"
)
@dataclass(frozen=True, kw_only=True)
class BernoulliMask:
    """A mask of independent Bernoulli(p) draws (Xu and Zhang 2024), fixed before training.

    probability: p in (0, 1]; or budget: the number of entries to expect, for p = budget / all that
    can be chosen. The run's own budget is the number of entries that were drawn. A tensor's count
    is drawn first, Binomial(numel, p), and then a support of that many entries, each equally
    likely: the same distribution, and a file stores generator and seed, no indices.
    """

    budget: int | None = None
    probability: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_budget(self.budget)
        if (self.budget is None) == (self.probability is None):
            raise ConfigError("a Bernoulli mask needs either budget= or probability=, one of them")
        if self.probability is not None and not 0 < self.probability <= 1:
            raise ConfigError(f"probability must be in (0, 1], found {self.probability}")

    def resolve(self, scene: Scene) -> FixedSupport:
        """The mask drawn for these targets; BudgetError when it came out empty."""
        free = scene.free()
        p = self.probability
        if p is None:
            assert self.budget is not None
            p = scene.left(self.budget) / max(1, sum(free))
        counts = [
            successes(self.seed, target.name, n, p)
            for target, n in zip(scene.targets, free, strict=True)
        ]
        drawn = zip(scene.targets, counts, strict=True)
        support = [draw(self.seed, target, count) for target, count in drawn if count]
        if not support:
            raise BudgetError(
                f"seed {self.seed} draws none of {sum(free)} entries with probability {p:g}; "
                "raise it or take another seed"
            )
        return FixedSupport(budget=scene.taken + sum(counts), support=support)


def successes(seed: int, name: str, trials: int, probability: float) -> int:
    """A draw from Binomial(trials, probability) in the generator's integers, O(trials).

    The same on every platform and version, which samplers that go through logarithms are not.
    """
    most = np.uint64(max(0, ceil(probability * 2**64) - 1))
    return sum(
        int((philox_words(seed, name, min(_PART, trials - at), f"trials {at}") <= most).sum())
        for at in range(0, trials, _PART)
        if probability > 0
    )
