"""How large the changes of a delta are: a histogram of |change|, tensor by tensor.

The edges stand on one fixed logarithmic grid, 10^(k/8) for integers k. So a tensor is counted
without knowing the others, in one reading, and the counts of tensors add up exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, log10
from typing import Any

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.differences import changes_of
from deltakit.dtypes import Array

PER_DECADE = 8
_LARGEST = np.finfo(np.float64).max


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Entries by |change|: |v| in add mode, |v - base| in set mode, in n bins.

    Bin i holds edges[i] <= |change| < edges[i + 1], where edges[i] is 10^((first + i * step) / 8)
    and the largest float64 belongs to the bin below it. The first and the last bin hold entries (n
    is 0 when no bin does). positive, negative: int64 [n], by the sign of the change. zeros: entries that change nothing. unknown: those of set mode
    without base values. non_finite: changes to or from infinities and NaN.
    """

    first: int
    step: int
    positive: Array
    negative: Array
    zeros: int = 0
    unknown: int = 0
    non_finite: int = 0

    @classmethod
    def of(cls, tensor: TensorDelta) -> Histogram:
        """The finest histogram of one tensor, 8 bins per decade. Takes O(nnz) time."""
        none = np.zeros(0, np.int64)
        changes = changes_of(tensor)
        if changes is None:
            return cls(first=0, step=1, positive=none, negative=none, unknown=tensor.nnz)
        finite = changes[np.isfinite(changes)]
        moved = finite[finite != 0]
        first, counts = _binned(moved) if moved.size else (0, [none, none])
        return cls(
            first=first,
            step=1,
            positive=counts[0],
            negative=counts[1],
            zeros=finite.size - moved.size,
            non_finite=changes.size - finite.size,
        )

    @classmethod
    def combined(cls, parts: Iterable[Histogram]) -> Histogram:
        """The histogram of several tensors together, as coarse as the coarsest of them."""
        given = list(parts)
        step = max((part.step for part in given), default=1)
        told = [part.widened(step) for part in given if part.bins]
        first = min((part.first for part in told), default=0)
        bins = max(((part.first - first) // step + part.bins for part in told), default=0)
        positive, negative = np.zeros((2, bins), np.int64)
        for part in told:
            at = (part.first - first) // step
            positive[at : at + part.bins] += part.positive
            negative[at : at + part.bins] += part.negative
        return cls(
            first=first,
            step=step,
            positive=positive,
            negative=negative,
            zeros=sum(part.zeros for part in given),
            unknown=sum(part.unknown for part in given),
            non_finite=sum(part.non_finite for part in given),
        )

    @property
    def bins(self) -> int:
        """How many bins there are, n."""
        return len(self.positive)

    @property
    def edges(self) -> Array:
        """Where the bins begin and the last one ends, float64 [n + 1], rising."""
        return _edges(self.first, self.bins, self.step)

    @property
    def counts(self) -> Array:
        """Entries of either sign, int64 [n]."""
        return np.asarray(self.positive + self.negative)

    @property
    def entries(self) -> int:
        """All entries: in bins, unchanged, unknown and not finite."""
        return int(self.counts.sum()) + self.zeros + self.unknown + self.non_finite

    def coarsened(self, bins: int) -> Histogram:
        """The same in at most `bins` (at least 2) bins: neighbours are joined, pair by pair."""
        found = self
        while found.bins > max(bins, 2):
            found = found.widened(2 * found.step)
        return found

    def widened(self, step: int) -> Histogram:
        """The same in bins of `step` (a multiple of the present one), which start at multiples."""
        first = self.first // step * step
        at = (self.first - first) // self.step + np.arange(self.bins)
        joined = at // (step // self.step)
        positive, negative = np.zeros((2, int(joined.max(initial=-1)) + 1), np.int64)
        np.add.at(positive, joined, self.positive)
        np.add.at(negative, joined, self.negative)
        return Histogram(
            first=first,
            step=step,
            positive=positive,
            negative=negative,
            zeros=self.zeros,
            unknown=self.unknown,
            non_finite=self.non_finite,
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, the edges to six digits."""
        return {
            "edges": [float(f"{edge:.6g}") for edge in self.edges],
            "positive": self.positive.tolist(),
            "negative": self.negative.tolist(),
            "zeros": self.zeros,
            "unknown": self.unknown,
            "non_finite": self.non_finite,
        }


def _binned(changes: Array) -> tuple[int, list[Array]]:
    """The first bin that is not empty, and positive and negative changes from there on, int64.

    changes: [n >= 1], finite and not zero.
    """
    sizes = np.abs(changes)
    low, high = (floor(PER_DECADE * log10(size)) for size in (sizes.min(), sizes.max()))
    low, bins = low - 1, high - low + 3  # a logarithm may round across an edge
    edges = _edges(low, bins, 1)
    at = np.minimum(np.searchsorted(edges, sizes, side="right") - 1, bins - 1)
    at += bins * (changes < 0)
    counts = np.bincount(at, minlength=2 * bins).reshape(2, bins)
    held = np.flatnonzero(counts.sum(0))
    return low + int(held[0]), list(counts[:, held[0] : held[-1] + 1])


def _edges(first: int, bins: int, step: int) -> Array:
    """10^(k / 8) for k = first, first + step, ..., float64 [bins + 1], within the finite."""
    exponents = (first + step * np.arange(bins + 1)) / PER_DECADE
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.minimum(10.0**exponents, _LARGEST))
