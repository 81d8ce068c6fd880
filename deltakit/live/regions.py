"""Parts of a live tensor that are parts of a checkpoint's tensor, and flat indices between them.

A view is what strides can describe: a slice, a transposition, a reshape of them. Whatever a
conversion does by slicing, joining, stacking, transposing and copying is a chain of such views, so
flat indices are translated both ways by arithmetic, in O(entries), without a tensor in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from deltakit.dtypes import Array


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a flat storage: element (c0, c1, ...) is at offset + sum of c * stride."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """The storage's positions [start, stop) that hold all of the view."""
        if 0 in self.shape:
            return self.offset, self.offset
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset, self.offset + sum((n - 1) * step for n, step in steps) + 1

    def ranks(self, flat: Array) -> tuple[Array, Array]:
        """Which of the positions [n] are in the view, and their row-major numbers in it.

        Both int64 [m]. A coordinate is the quotient by its stride, largest stride first: no element
        of a view of distinct elements reaches the next multiple of a larger stride.
        """
        rest = flat - self.offset
        rank = np.zeros(len(flat), np.int64)
        inside = rest >= 0
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.strides[a]):
            if self.shape[axis] != 1:  # the stride of a single element means nothing
                coordinate, rest = np.divmod(rest, self.strides[axis])
                inside &= coordinate < self.shape[axis]
                rank += coordinate * prod(self.shape[axis + 1 :])
        kept = np.flatnonzero(inside & (rest == 0))
        return kept, rank[kept]

    def positions(self, ranks: Array) -> Array:
        """The storage's positions, int64 [n], of the view's elements of these row-major numbers."""
        flat = np.full(len(ranks), self.offset, np.int64)
        for axis in reversed(range(len(self.shape))):
            ranks, coordinate = np.divmod(ranks, self.shape[axis])
            flat += coordinate * self.strides[axis]
        return flat


@dataclass(frozen=True, slots=True)
class Region:
    """A part of live tensor `live` that is a part of the checkpoint's tensor `stored`.

    hops: from the live tensor to the stored one, pairs of views of equal shape: elements of the
    first are those of the second, in the same order.
    """

    live: str
    live_shape: tuple[int, ...]
    stored: str
    stored_shape: tuple[int, ...]
    hops: tuple[tuple[View, View], ...]

    @property
    def is_whole(self) -> bool:
        """Whether the live tensor and the stored one are the same, in the same order."""
        rows = View(0, self.stored_shape, _row_major(self.stored_shape))
        same = all(before == after == rows for before, after in self.hops)
        return same and self.live_shape == self.stored_shape

    def moved(self, live: str, stored: str) -> Region:
        """The same region of tensors of other names."""
        return replace(self, live=live, stored=stored)

    def to_stored(self, indices: Array) -> tuple[Array, Array]:
        """Flat live indices [n], sorted: which of them are in the region, and where they are stored.

        Both int64 [m]: positions in `indices`, and flat indices of the stored tensor.
        """
        return _follow(indices, self.hops)

    def to_live(self, indices: Array) -> tuple[Array, Array]:
        """Flat stored indices [n], sorted: which are in the region, and the live indices of those."""
        return _follow(indices, [(after, before) for before, after in reversed(self.hops)])


def whole(live: str, stored: str, shape: tuple[int, ...]) -> Region:
    """All of a live tensor, held by a stored tensor of the same shape."""
    rows = View(0, shape, _row_major(shape))
    return Region(live, shape, stored, shape, ((rows, rows),))


def turned(live: str, stored: str, shape: tuple[int, ...]) -> Region:
    """All of a live matrix, held transposed by a stored one of this shape."""
    height, width = shape
    columns = View(0, shape, (1, height))
    return Region(live, (width, height), stored, shape, ((columns, View(0, shape, (width, 1))),))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _follow(flat: Array, hops: Sequence[tuple[View, View]]) -> tuple[Array, Array]:
    start, stop = np.searchsorted(flat, hops[0][0].span)
    kept, flat = np.arange(start, stop), flat[start:stop]
    for before, after in hops:
        inside, ranks = before.ranks(flat)
        kept, flat = kept[inside], after.positions(ranks)
    return kept, flat
