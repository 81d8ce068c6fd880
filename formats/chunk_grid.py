"""A tensor cut into boxes: whether they make it up exactly, and which of them hold what.

The bounds of all boxes cut the tensor into cells, and a map of cells tells the box that each is in.
For the grids that sharding makes there are as many cells as boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from deltakit.dtypes import Array

MAX_CELLS = 2**24
Sizes = tuple[int, ...]
Box = tuple[Sizes, Sizes]  # the first coordinates, and those behind the last, of each dimension


class ChunkGrid:
    """The boxes of a tensor of `shape`, given by offsets and sizes (all above 0), [n, dims] each.

    Raises ValueError where they overlap, leave something out, or are cut so irregularly that there
    are more than 16 million cells.
    """

    def __init__(self, shape: Sizes, offsets: Sequence[Sizes], sizes: Sequence[Sizes]) -> None:
        self.shape = shape
        self.starts = np.array(offsets, np.int64).reshape(len(offsets), len(shape))
        self.stops = self.starts + np.array(sizes, np.int64).reshape(len(sizes), len(shape))
        if 0 in shape:
            return
        both = np.concatenate([self.starts, self.stops])
        self._bounds = [np.unique(np.append(both[:, d], (0, n))) for d, n in enumerate(shape)]
        cells = tuple(len(bounds) - 1 for bounds in self._bounds)
        if prod(cells) > MAX_CELLS:
            raise ValueError("its chunks are cut too irregularly")
        self._owner = np.full(cells, -1, np.int32)
        first, last = (
            [b.searchsorted(found[:, d]).tolist() for d, b in enumerate(self._bounds)]
            for found in (self.starts, self.stops)
        )
        for chunk in range(len(self.starts)):
            place = tuple(
                slice(low[chunk], high[chunk]) for low, high in zip(first, last, strict=True)
            )
            if (self._owner[place] >= 0).any():
                raise ValueError(f"its chunk at {list(offsets[chunk])} overlaps another")
            self._owner[place] = chunk
        if (self._owner < 0).any():
            cell = np.argwhere(self._owner < 0)[0].tolist()
            at = [int(b[c]) for b, c in zip(self._bounds, cell, strict=True)]
            raise ValueError(f"no chunk holds its element at {at}")

    def owners(self, coordinates: Sequence[Array]) -> Array:
        """The numbers of the boxes that hold elements, [k]; coordinates: int64 [k] per dimension."""
        cells = tuple(
            bounds.searchsorted(found, "right") - 1
            for bounds, found in zip(self._bounds, coordinates, strict=True)
        )
        return np.asarray(self._owner[cells]).reshape(-1)

    def parts(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The numbers of the boxes that hold parts of `box`, and these parts."""
        starts, stops = np.maximum(self.starts, box[0]), np.minimum(self.stops, box[1])
        for chunk in np.flatnonzero((starts < stops).all(axis=1)).tolist():
            yield chunk, (tuple(starts[chunk].tolist()), tuple(stops[chunk].tolist()))


def flat_boxes(shape: Sizes, start: int, stop: int) -> Iterator[Box]:
    """The boxes, in order, that make up the flat elements [start, stop) of a tensor of at least one
    dimension, row-major.

    At most 2 * dims - 1 of them: each is one range of one dimension, at one place of those before
    it and with all of those behind it.
    """
    if start >= stop:
        return
    row = prod(shape[1:])
    first, last = start // row, -(-stop // row)
    whole_first, whole_last = -(-start // row), stop // row
    if whole_first > whole_last:  # all of it within one row
        yield from _within_row(shape, first, start - first * row, stop - first * row)
        return
    if first < whole_first:
        yield from _within_row(shape, first, start - first * row, row)
    if whole_first < whole_last:
        rest = shape[1:]
        yield (whole_first, *(0 for _ in rest)), (whole_last, *rest)
    if whole_last < last:
        yield from _within_row(shape, whole_last, 0, stop - whole_last * row)


def _within_row(shape: Sizes, row: int, start: int, stop: int) -> Iterator[Box]:
    for low, high in flat_boxes(shape[1:], start, stop):
        yield (row, *low), (row + 1, *high)
