"""Where in a tensor the entries are: counts over a coarse raster of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Occupancy:
    """Entries of a tensor, seen as a matrix, over r by c bins of rows and columns.

    shape: rows and columns of the matrix. rows: int64 [r], columns: int64 [c], cells: int64 [r, c].
    Bin i of the rows is rows [i * rows_per_bin, (i + 1) * rows_per_bin), cut at the matrix' end;
    the same for columns.
    """

    shape: tuple[int, int]
    rows: Array
    columns: Array
    cells: Array
    rows_per_bin: int
    columns_per_bin: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {
            "shape": list(self.shape),
            "rows": self.rows.tolist(),
            "columns": self.columns.tolist(),
            "cells": self.cells.tolist(),
            "rows_per_bin": self.rows_per_bin,
            "columns_per_bin": self.columns_per_bin,
        }


def occupancy(tensor: TensorDelta, bins: int) -> Occupancy:
    """Count the entries over at most `bins` (at least 1) bins of rows and as many of columns.

    A vector (and a scalar) is one row; of more than two dimensions, the first stands against the
    rest together, as in the weights of convolutions and of fused experts. Takes O(nnz) time.
    """
    height, width = matrix_shape(tensor.shape)
    tall, wide = (max(1, -(-length // bins)) for length in (height, width))
    r, c = -(-height // tall), -(-width // wide)
    row = tensor.indices // max(width, 1)
    column = tensor.indices - row * width
    cells = np.bincount(row // tall * c + column // wide, minlength=r * c).reshape(r, c)
    return Occupancy(
        shape=(height, width),
        rows=cells.sum(1),
        columns=cells.sum(0),
        cells=cells,
        rows_per_bin=tall,
        columns_per_bin=wide,
    )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of any shape: [n] is 1 x n, [a, b, c] is a x (b * c)."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
