"""Structured masking by rows and columns: all weights of some output or input features."""

from __future__ import annotations

from dataclasses import dataclass

from deltakit.selection.methods import METHODS, Candidate, Scene, Start, check_budget
from deltakit.selection.units import (
    NONE,
    Units,
    check_order,
    ordered,
    output_axis,
    slices,
    take_units,
)


@METHODS.register("rows", "whole output features", "structured masking, Xu and Zhang 2024")
@dataclass(frozen=True, kw_only=True)
class RowMask:
    """All weights of some output features, exactly `budget` entries: the last feature is cut.

    A row is what one output feature reads: a row of a linear layer [out, in], a column of GPT-2's
    transposed one, a token of an embedding, one element of a vector. order: "random" (drawn from
    `seed`, different for every tensor), "first" or "last". Tensors give equal shares.
    """

    budget: int
    order: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_order(self.order)

    def start(self, scene: Scene) -> Start:
        """The whole support; BudgetError for budget checkpoints, which a fixed support lacks."""
        units = [
            _features(target, output_axis(target, scene.model), self, "rows")
            for target in scene.targets
        ]
        return take_units(scene, self.budget, units, "rows")


@METHODS.register("columns", "whole input features", "structured masking, Xu and Zhang 2024")
@dataclass(frozen=True, kw_only=True)
class ColumnMask:
    """All weights of some input features, exactly `budget` entries: the last feature is cut.

    The structured masking of Xu and Zhang (2024), whose "head" is order "first" and "tail" is
    "last"; "random" is drawn from `seed`, different for every tensor. A column is all that reads
    one input feature: a column of a linear layer [out, in], a row of GPT-2's transposed one, one
    feature of an embedding, a whole bias vector. Tensors give equal shares.
    """

    budget: int
    order: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_order(self.order)

    def start(self, scene: Scene) -> Start:
        """The whole support; BudgetError for budget checkpoints, which a fixed support lacks."""
        units = [
            _features(target, 1 - output_axis(target, scene.model), self, "columns")
            for target in scene.targets
        ]
        return take_units(scene, self.budget, units, "columns")


def _features(target: Candidate, axis: int, mask: RowMask | ColumnMask, what: str) -> Units:
    """The slices of a tensor along an axis; a vector counts as one column."""
    if not target.shape:
        return NONE
    shape = target.shape if len(target.shape) > 1 else (*target.shape, 1)
    order = ordered(shape[axis], mask.order, mask.seed, target.name, what)
    return Units(order, slices(shape, axis))
