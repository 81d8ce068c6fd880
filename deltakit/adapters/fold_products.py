"""What adapters of the LoRA family add to a weight: rows of products, never the whole of it.

Products are summed rank by rank, in order, by elementwise float32 operations that are never fused,
and multiplied by the scaling last. A BLAS would be faster on dense factors and give other bits on
every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from deltakit.dtypes import Array

BLOCK = 2**17  # elements that are summed at a time, so that they stay in the processor's cache
_SPARSE = 0.5  # share of nonzero elements below which zeros are worth skipping

Rows = Callable[[int, int], Array]


class Change(Protocol):
    """The change of one tensor of the base, seen as a matrix of `shape` [rows, columns].

    held: bytes that it keeps in memory, its base aside.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def held(self) -> int: ...

    def rows(self, start: int, stop: int) -> Array:
        """The change of the rows [start, stop), float32 [stop - start, columns]."""
        ...


@dataclass(frozen=True, eq=False)
class Product:
    """scaling * (left @ right); left is float32 [n, r], right float32 [r, m]."""

    left: Array
    right: Array
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def held(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def rows(self, start: int, stop: int) -> Array:
        """See `Change`. Factors of zero are skipped, which leaves every bit as it is: sums begin
        at +0, and adding 0 of either sign changes no sum that began so."""
        made = np.zeros((stop - start, self.shape[1]), np.float32)
        step = max(1, BLOCK // max(1, self.shape[1]))
        room = np.empty((min(step, stop - start), self.shape[1]), np.float32)
        for at in range(0, stop - start, step):
            block = made[at : at + step]
            self._sum(self.left[start + at : start + at + len(block)], block, room[: len(block)])
        made *= np.float32(self.scaling)
        return made

    def _sum(self, left: Array, into: Array, room: Array) -> None:
        """Add left [b, r] @ right to `into` [b, m]; `room` is as large as it."""
        for rank, columns in enumerate(self._columns):
            column, row = left[:, rank], self.right[rank]
            rows = np.flatnonzero(column != 0)
            few_rows = rows.size < _SPARSE * len(column)
            if not rows.size or (columns is not None and not columns.size):
                continue
            if columns is not None:
                place = np.ix_(rows, columns) if few_rows else np.s_[:, columns]
                into[place] += (column[rows] if few_rows else column)[:, None] * row[columns]
            elif few_rows:
                into[rows] += column[rows, None] * row
            else:
                np.multiply(column[:, None], row, out=room)
                into += room

    @cached_property
    def _columns(self) -> list[Array | None]:
        """For each rank the columns where `right` is not zero; None where that is most of them."""
        found = [np.flatnonzero(row != 0) for row in self.right]
        return [each if each.size < _SPARSE * self.shape[1] else None for each in found]


@dataclass(frozen=True, eq=False)
class Difference:
    """now - before."""

    now: Change
    before: Change

    @property
    def shape(self) -> tuple[int, int]:
        return self.now.shape

    @property
    def held(self) -> int:
        return self.now.held + self.before.held

    def rows(self, start: int, stop: int) -> Array:
        return np.asarray(self.now.rows(start, stop) - self.before.rows(start, stop))


@dataclass(frozen=True, eq=False)
class Hadamard:
    """scaling * (one * other), element by element: LoHa (Hyeon-Woo et al., "FedPara", 2022)."""

    one: Product
    other: Product
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.one.shape

    @property
    def held(self) -> int:
        return self.one.held + self.other.held

    def rows(self, start: int, stop: int) -> Array:
        made = self.one.rows(start, stop) * self.other.rows(start, stop)
        return np.asarray(made * np.float32(self.scaling))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """scaling * (one ⊗ other): LoKr (Yeh et al., "LyCORIS", 2023).

    one: float32 [a, c]. other: float32 [b, d]. The product is [a * b, c * d].
    """

    one: Array
    other: Array
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.one) * len(self.other), self.one.shape[1] * self.other.shape[1]

    @property
    def held(self) -> int:
        return self.one.nbytes + self.other.nbytes

    def rows(self, start: int, stop: int) -> Array:
        high, low = np.divmod(np.arange(start, stop), len(self.other))
        made = self.one[high][:, :, None] * self.other[low][:, None, :]
        made *= np.float32(self.scaling)
        return np.asarray(made.reshape(stop - start, self.shape[1]))


@dataclass(frozen=True, eq=False)
class Rescaled:
    """base * (gain - 1), gain being one factor for each row or each column: (IA)3 (Liu et al.,
    "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper", 2022).

    base: gives rows of the base's tensor, float32. gain: float32 [rows, 1] or [1, columns].
    """

    base: Rows
    gain: Array
    shape: tuple[int, int]

    @property
    def held(self) -> int:
        return self.gain.nbytes

    def rows(self, start: int, stop: int) -> Array:
        more = self.gain - np.float32(1)
        more = more if len(more) == 1 else more[start:stop]
        made = np.zeros((stop - start, self.shape[1]), np.float32)
        # what is not scaled does not change, whatever the base holds there
        np.multiply(self.base(start, stop), more, out=made, where=more != 0)
        return made


def window(change: Change, start: int, stop: int) -> Array:
    """The change of the flat elements [start, stop), float32 [stop - start]."""
    columns = change.shape[1]
    first = start // columns
    rows = change.rows(first, -(-stop // columns))
    return rows.reshape(-1)[start - first * columns : stop - first * columns]
