"""The direction of what two adapters change in the base's weights, without making these changes.

For products, <B1 A1, B2 A2> is the sum of (B1' B2) * (A1 A2') over pairs of ranks, so the cosine of
two changes costs what their factors do. All is computed in float64.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from deltakit.adapters.fold_delta import products_of_adapter
from deltakit.adapters.fold_products import Change, Difference, Product
from deltakit.delta import SparseDelta
from deltakit.errors import DeltakitError


def folded_cosine(one: SparseDelta, other: SparseDelta) -> float | None:
    """The cosine of the changes of all weights by two adapters.

    None where one of them adds anything but products of thin matrices to linear layers (as LoRA and
    AdaLoRA do), and where one of them changes nothing.
    """
    try:
        mine, theirs = (products_of_adapter(each) for each in (one, other))
        dot = sum(_inner(mine[name], theirs[name]) for name in mine if name in theirs)
        squares = [sum(_inner(c, c) for c in side.values()) for side in (mine, theirs)]
    except DeltakitError:
        return None
    length = sqrt(max(squares[0], 0.0)) * sqrt(max(squares[1], 0.0))
    return dot / length if length else None


def _inner(one: Change, other: Change) -> float:
    """The sum of the products of all elements of two changes of a tensor."""
    pairs = ((s * t, p, q) for s, p in _products(one) for t, q in _products(other))
    return float(sum(sign * _of_products(p, q) for sign, p, q in pairs))


def _of_products(one: Product, other: Product) -> float:
    if one.shape != other.shape:  # of different bases
        return 0.0
    left = one.left.astype(np.float64).T @ other.left.astype(np.float64)
    right = one.right.astype(np.float64) @ other.right.astype(np.float64).T
    return one.scaling * other.scaling * float((left * right).sum())


def _products(change: Change) -> list[tuple[int, Product]]:
    """The change as a sum of products with their signs."""
    if isinstance(change, Difference):
        before = [(-sign, product) for sign, product in _products(change.before)]
        return _products(change.now) + before
    assert isinstance(change, Product)
    return [(1, change)]
