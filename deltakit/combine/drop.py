"""Dropping changes at random, the same ones on every platform, and making up for the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deltakit.combine.method import Method
from deltakit.combine.tasks import Vector
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.formats.seeded import MAX_SEED, philox_words


@dataclass(frozen=True, kw_only=True)
class Dropped(Method):
    """A method that keeps each change with some probability.

    rescale: what is kept is divided by its probability ("inverse"), scaled so that the tensor's
    sum of magnitudes is what it was ("l1"), or left alone ("none"). seed: of the draws, 0 to
    2^64 - 1; each delta (by its position) and each tensor (by its name) has draws of its own, the
    i-th change of a tensor the i-th, so that no tensor's draws depend on what else is there.
    """

    rescale: Literal["inverse", "l1", "none"] = "inverse"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed {self.seed} is not within 0..2^64-1")

    def survivors(self, vector: Vector, probability: Any, name: str, number: int) -> Vector:
        """The changes of delta `number` to tensor `name` that stay, rescaled.

        probability: of keeping, a number or an array [n].
        """
        values = vector.values
        keep = draws(self.seed, name, len(values), number) < probability
        left = values[keep]
        if self.rescale == "inverse":
            chance = np.broadcast_to(probability, keep.shape)[keep]
            left = left / chance.astype(left.dtype)
        elif self.rescale == "l1":
            left = left * left.dtype.type(_ratio(values, left))
        return Vector(vector.indices[keep], left)


def draws(seed: int, name: str, count: int, number: int) -> Array:
    """`count` numbers in [0, 1) for tensor `name` of delta `number`, float64, exact: the top 53
    bits of words of Philox."""
    words = philox_words(seed, name, count, f"stack {number}")
    return np.asarray((words >> np.uint64(11)) * 2.0**-53)


def _ratio(before: Array, after: Array) -> float:
    """By what the rest must grow to keep the sum of magnitudes; 1 where next to nothing is left."""
    sums = [float(np.abs(values).sum(dtype=np.float64)) for values in (before, after)]
    return sums[0] / sums[1] if min(sums) >= 1e-7 else 1.0
