"""Deltas for tests, and the merged tensor by a naive dense reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of


def adding(
    name: str, base: Array, rng: np.random.Generator, count: int, trained: str = ""
) -> TensorDelta:
    """An add delta of `count` random entries on the tensor `base`."""
    indices = np.sort(rng.choice(base.size, count, replace=False))
    return TensorDelta(
        name=name,
        shape=base.shape,
        dtype=dtype_of(base).name,
        mode="add",
        indices=indices,
        values=rng.standard_normal(count),
        trained_dtype=trained,
    )


def only(*tensors: TensorDelta, **more: Any) -> SparseDelta:
    return SparseDelta(tensors={t.name: t for t in tensors}, **more)


def dense_reference(base: Array, deltas: list[TensorDelta], weights: list[float]) -> Array:
    """The merged tensor by a naive dense loop; words where no delta has an entry are the base's."""
    compute = np.float64 if base.dtype == np.float64 else np.float32
    total, touched = np.zeros(base.size, compute), np.zeros(base.size, bool)
    for delta, weight in zip(deltas, weights, strict=True):
        dense = np.zeros(base.size, compute)
        dense[delta.indices] = delta.values
        scaled = compute(weight) * dense
        total = total + scaled
        touched[delta.indices] = True
    moved = (base.reshape(-1).astype(compute) + total).astype(base.dtype)
    return np.where(touched, moved, base.reshape(-1)).reshape(base.shape)
