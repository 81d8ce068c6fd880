"""Trimming: each delta keeps its largest changes, exactly as many as its density says."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

import numpy as np

from deltakit.combine.method import Method
from deltakit.combine.tasks import Task, Tasks, Vector
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.truncation import top


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """A method with a density: the share of something that stays.

    density: above 0, at most 1. density_of: of a delta's "entries" (those that are zero do not
    count), or of "numel", all elements of the tensor or, over the whole delta, of the base.
    rounding: how density * n becomes a whole number: "exact" takes the decimal number as written
    (0.29 of 100 are 29), "float" the product in double precision (28), as peers do; both go down.
    """

    density: float = 0.2
    density_of: Literal["entries", "numel"] = "entries"
    rounding: Literal["exact", "float"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def count(self, whole: int) -> int:
        """How many of `whole` stay."""
        return share(self.density, whole, self.rounding)

    def count_in(self, task: Task, name: str, vector: Vector) -> int:
        """How many changes of one tensor stay."""
        numel = task.tensors[name].numel
        return self.count(len(vector.indices) if self.density_of == "entries" else numel)


@dataclass(frozen=True, kw_only=True)
class Trimmed(Dense):
    """A method that first keeps the changes of largest magnitude.

    trim_scope: over the whole delta ("global") or in each tensor by itself ("tensor"). Ties break
    by tensor order, then by lower index. Share of "numel" and scope "global" need the number of
    the base's weights, as deltas record it. least: of changes that stay where there are any, in
    the delta or in each tensor (mergekit: 1).
    """

    trim_scope: Literal["global", "tensor"] = "global"
    least: int = 0

    def trimmed(self, tasks: Tasks) -> list[dict[str, Vector]]:
        """The task vectors, trimmed; tensors in which nothing is left stay, empty."""
        return [self._trimmed(task, tasks.total_weights) for task in tasks]

    def _trimmed(self, task: Task, total_weights: int | None) -> dict[str, Vector]:
        vectors = task.vectors()
        if self.trim_scope == "tensor":
            return {
                name: kept(v, top(np.abs(v.values), max(self.least, self.count_in(task, name, v))))
                for name, v in vectors.items()
            }
        if not vectors:
            return {}
        if self.density_of == "entries":
            whole = sum(len(v.indices) for v in vectors.values())
        elif total_weights is None:
            raise ConfigError(
                "a density of numel with the scope global needs the number of the base's weights, "
                "which no delta records; give the base, or take the scope tensor"
            )
        else:
            whole = total_weights
        sizes = np.concatenate([np.abs(v.values) for v in vectors.values()])
        keep = top(sizes, max(self.least, self.count(whole)))
        ends = np.cumsum([len(v.indices) for v in vectors.values()])
        masks = np.split(keep, ends[:-1])
        return {name: kept(v, mask) for (name, v), mask in zip(vectors.items(), masks, strict=True)}


def kept(vector: Vector, mask: Array) -> Vector:
    """The changes where the mask [n] is true."""
    at = np.flatnonzero(mask)  # far quicker than the mask itself where little stays
    return vector if len(at) == len(mask) else Vector(vector.indices[at], vector.values[at])


def share(density: float, whole: int, rounding: Literal["exact", "float"] = "exact") -> int:
    """density * whole, rounded down; see `Dense`."""
    return int(density * whole) if rounding == "float" else floor(Fraction(repr(density)) * whole)


def check_density(density: float) -> None:
    """Raise ConfigError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ConfigError(f"density {density} is not above 0 and at most 1")
