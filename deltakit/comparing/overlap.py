"""How the entries of two deltas meet: counts that add up over tensors, and their ratios."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import prod, sqrt
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.supports import shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Two deltas on some tensors.

    first, second: entries of either delta. shared: entries of both. expected: how many they would
    share if both supports were drawn at random, tensor by tensor: first * second / elements.
    signed: shared entries whose change is known and finite on both sides. conflicts: those among
    them that the deltas move in opposite directions. unknown: entries of either delta whose change
    is not known (set mode without base values) or not finite.
    dot, first_squares, second_squares: sums over the known changes, in float64.
    """

    first: int = 0
    second: int = 0
    shared: int = 0
    expected: float = 0.0
    signed: int = 0
    conflicts: int = 0
    unknown: int = 0
    dot: float = 0.0
    first_squares: float = 0.0
    second_squares: float = 0.0

    @classmethod
    def combined(cls, parts: Iterable[Overlap]) -> Overlap:
        """Several tensors together."""
        given = list(parts)
        return cls(**{f.name: sum(getattr(part, f.name) for part in given) for f in fields(cls)})

    @property
    def jaccard(self) -> float:
        """Shared entries as a share of the union; 0.0 of nothing."""
        return _ratio(self.shared, self.first + self.second - self.shared)

    @property
    def first_contained(self) -> float:
        """Share of the first delta's entries that the second has too."""
        return _ratio(self.shared, self.first)

    @property
    def second_contained(self) -> float:
        """Share of the second delta's entries that the first has too."""
        return _ratio(self.shared, self.second)

    @property
    def conflict_share(self) -> float | None:
        """Conflicts as a share of the shared entries with known signs; None without any."""
        return self.conflicts / self.signed if self.signed else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the two deltas as vectors of all weights, zero outside their supports.

        None where a change is not known or not finite, and where one of them moves nothing.
        """
        length = sqrt(self.first_squares) * sqrt(self.second_squares)
        return None if self.unknown or not length else self.dot / length

    @property
    def collision(self) -> float:
        """Share of the smaller delta's entries that the other moves the opposite way.

        Shared entries of unknown sign count half, as independent signs would.
        """
        opposed = self.conflicts + (self.shared - self.signed) / 2
        return _ratio(opposed, min(self.first, self.second))

    def as_dict(self) -> dict[str, Any]:
        """Counts and ratios as plain JSON values."""
        told = asdict(self)
        for name in ("dot", "first_squares", "second_squares"):
            del told[name]
        ratios = ("jaccard", "first_contained", "second_contained", "conflict_share", "cosine")
        return told | {name: getattr(self, name) for name in (*ratios, "collision")}


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of one delta in one tensor.

    shape: of the tensor. indices: int64 [nnz], sorted. changes: float [nnz], or None where they are not known.
    """

    shape: tuple[int, ...]
    indices: Array
    changes: Array | None

    @property
    def unknown(self) -> int:
        """Entries whose change is not known or not finite."""
        if self.changes is None:
            return len(self.indices)
        return len(self.indices) - int(np.count_nonzero(np.isfinite(self.changes)))

    @property
    def squares(self) -> float:
        """The sum of the squares of the known changes."""
        if self.changes is None:
            return 0.0
        known = self.changes[np.isfinite(self.changes)].astype(np.float64)
        return float(known @ known)


def overlap_of(one: Entries | None, other: Entries | None) -> Overlap:
    """How two deltas meet in one tensor; None for a delta that does not touch it.

    Entries of tensors of different shapes never meet, as they are not the same weights.
    Takes O(n log m) time for supports of n <= m entries.
    """
    sides = [side for side in (one, other) if side is not None]
    numbers: dict[str, Any] = {"unknown": sum(side.unknown for side in sides)}
    if one is not None:
        numbers |= {"first": len(one.indices), "first_squares": one.squares}
    if other is not None:
        numbers |= {"second": len(other.indices), "second_squares": other.squares}
    if one is not None and other is not None and one.shape == other.shape:
        numbers |= _meeting(one, other)
    return Overlap(**numbers)


def _meeting(one: Entries, other: Entries) -> dict[str, Any]:
    mine, theirs = shared(one.indices, other.indices)
    met: dict[str, Any] = {
        "shared": len(mine),
        "expected": _ratio(len(one.indices) * len(other.indices), prod(one.shape)),
    }
    if one.changes is None or other.changes is None:
        return met
    a, b = one.changes[mine].astype(np.float64), other.changes[theirs].astype(np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    conflicts = int(np.count_nonzero(np.sign(a) * np.sign(b) < 0))
    return met | {"signed": len(a), "conflicts": conflicts, "dot": float(a @ b)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
