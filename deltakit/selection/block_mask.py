"""Structured masking by square blocks, or by runs of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.errors import ConfigError
from deltakit.selection.methods import METHODS, Candidate, Scene, Start, check_budget
from deltakit.selection.units import NONE, Units, check_order, ordered, take_units


@METHODS.register("blocks", "contiguous blocks of weights", "block sparsity, Gray et al. 2017")
@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Square blocks of weights, exactly `budget` entries: the last block is cut.

    block_size: the side of a block of a matrix, the length of a run in a vector; tensors of more
    axes count as matrices with their first axis as rows. Blocks at the edges may be smaller.
    order: "random" (drawn from `seed`, different for every tensor), "first" or "last", in row-major
    order. Tensors give equal shares.
    """

    budget: int
    block_size: int = 16
    order: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_order(self.order)
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, found {self.block_size}")

    def start(self, scene: Scene) -> Start:
        """The whole support; BudgetError for budget checkpoints, which a fixed support lacks."""
        units = [self._units(target) for target in scene.targets]
        return take_units(scene, self.budget, units, "blocks")

    def _units(self, target: Candidate) -> Units:
        if not target.shape:
            return NONE
        rows = target.shape[0] if len(target.shape) > 1 else 1
        columns, side = target.numel // rows, self.block_size
        across = -(-columns // side)
        count = -(-rows // side) * across

        def indices(unit: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
            top, left = unit // across * side, unit % across * side
            down = np.arange(top, min(top + side, rows))
            along = np.arange(left, min(left + side, columns))
            return (down[:, None] * columns + along).reshape(-1)

        return Units(ordered(count, self.order, self.seed, target.name, "blocks"), indices)
