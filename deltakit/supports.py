"""Supports as sets: sorted flat indices united and intersected in one pass over both."""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array


def union(one: Array, other: Array) -> Array:
    """The sorted indices that stand in either, int64 [n]; both are int64, strictly increasing."""
    merged = np.sort(np.concatenate([one, other]), kind="stable")  # merges two sorted runs
    return np.asarray(merged[np.diff(merged, prepend=-1) != 0])


def shared(one: Array, other: Array) -> tuple[Array, Array]:
    """Where the common indices stand in `one` and in `other`, both int64 [n] and rising."""
    if len(other) < len(one):
        theirs, mine = shared(other, one)
        return mine, theirs
    if not len(one):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    at = np.searchsorted(other, one)
    found = np.flatnonzero(other[np.minimum(at, len(other) - 1)] == one)
    return found, at[found]
