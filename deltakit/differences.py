"""What entries change, as differences, and the proof that a difference gives the bits back."""

from __future__ import annotations

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, DType, add_exact


def changes_of(tensor: TensorDelta) -> Array | None:
    """The change of each entry, [nnz]: v for add, new - base for set, in the dtype of sums.

    float32 (float64 for float64 tensors and for dtypes without sums, such as int8). Changes to or
    from a value that is not finite are not finite. None for a set tensor without base values.
    """
    if tensor.mode == "add":
        return tensor.values
    if tensor.base_values is None:
        return None
    compute = tensor.kind.compute or np.dtype(np.float64)
    after, before = (w.view(tensor.kind.numpy) for w in (tensor.values, tensor.base_values))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(after.astype(compute) - before.astype(compute))


def proven_differences(before: Array, after: Array, kind: DType) -> Array | None:
    """v [nnz] with round(base + v) == tuned for every entry, bit for bit; None if there is none.

    before, after: raw words [nnz] of dtype `kind`. v is float32 (float64 for float64 tensors).
    """
    if kind.compute is None:
        return None
    base, tuned = before.view(kind.numpy), after.view(kind.numpy)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite fails the proof
        values = np.asarray(tuned.astype(kind.compute) - base.astype(kind.compute))
        if not np.isfinite(values).all():
            return None
        again = add_exact(base, [(1.0, values)]).view(kind.words)
    return values if np.array_equal(again, after) else None
