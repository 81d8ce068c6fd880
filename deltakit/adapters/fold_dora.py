"""DoRA: magnitudes and directions of a weight apart (Liu et al., "DoRA", 2024, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltakit.adapters.fold_products import BLOCK, Change, Rows
from deltakit.dtypes import Array


def norms(rows: Rows, shape: tuple[int, int], transposed: bool) -> Array:
    """The norms over the inputs of each output, float32: of each row, or of each column where
    `transposed`.

    rows: gives rows [start, stop) of a matrix of `shape`, float32. Squares are summed in float64,
    one input after the other, so that every platform and every size of blocks gets the same bits.
    """
    count, columns = shape
    total = np.zeros(columns if transposed else count, np.float64)
    step = max(1, 2 * BLOCK // max(1, columns))
    for start in range(0, count, step):
        stop = min(start + step, count)
        block = rows(start, stop).astype(np.float64)
        block *= block
        into = total if transposed else total[start:stop]
        for squares in block if transposed else np.ascontiguousarray(block.T):
            into += squares
    return np.sqrt(total).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Dora:
    """magnitude / ||base + inner|| * (base + inner) - base, the norms being those of outputs.

    inner: what LoRA adds to the direction. base: gives rows of the base's tensor, float32.
    magnitude: float32 [outputs]. transposed: whether outputs are the tensor's columns.
    """

    inner: Change
    base: Rows
    magnitude: Array
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def held(self) -> int:
        return self.inner.held + 16 * len(self.magnitude)

    def rows(self, start: int, stop: int) -> Array:
        gain = self._gain if self.transposed else self._gain[start:stop, None]
        base = self.base(start, stop)
        made = base + self.inner.rows(start, stop)
        made *= gain
        made -= base
        return np.asarray(made)

    @cached_property
    def _gain(self) -> Array:
        """magnitude / norm, [outputs]; exactly 1 where neither has moved. Read once, by rows."""
        length = norms(self._moved, self.shape, self.transposed)
        with np.errstate(divide="ignore", invalid="ignore"):  # an output of zeros: refused later
            return np.asarray(self.magnitude / length)

    def _moved(self, start: int, stop: int) -> Array:
        return np.asarray(self.base(start, stop) + self.inner.rows(start, stop))
