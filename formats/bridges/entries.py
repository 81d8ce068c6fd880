"""Foreign indices and values, checked and brought into order."""

from __future__ import annotations

from math import prod

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError

FLOAT32_EXACT = 2**24  # float32 holds every integer up to here


def in_order(
    name: str, shape: tuple[int, ...], indices: Array, values: Array
) -> tuple[Array, Array]:
    """Flat indices, int64 [nnz], strictly increasing, and their values.

    indices: integers [nnz] in any order, flat and row-major in `shape`; values: [nnz].
    Raises FormatError, naming the tensor, for lengths that differ, an index out of range and an
    index that stands twice.
    """
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or values.shape != indices.shape:
        raise FormatError(
            f"tensor {name!r}: expected integers [nnz] and values [nnz], found {indices.dtype} "
            f"{list(indices.shape)} and {values.dtype} {list(values.shape)}"
        )
    numel = prod(shape)
    if not indices.size:
        return indices.astype(np.int64), values
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= numel:
        raise FormatError(
            f"tensor {name!r}: index {low if low < 0 else high} is out of range for shape "
            f"{list(shape)}; is this the base that the file was made of?"
        )
    flat = indices.astype(np.int64)
    if (flat[1:] > flat[:-1]).all():
        return flat, values
    order = np.argsort(flat, kind="stable")
    flat = flat[order]
    twice = np.flatnonzero(flat[1:] == flat[:-1])
    if twice.size:
        raise FormatError(f"tensor {name!r}: index {flat[twice[0]]} stands twice")
    return flat, values[order]


def flattened(name: str, shape: tuple[int, ...], coordinates: Array) -> Array:
    """Flat row-major indices, int64 [nnz], of coordinates [ndim, nnz] in `shape`.

    Raises FormatError, naming the tensor, for a coordinate outside `shape`.
    """
    if coordinates.ndim != 2 or len(coordinates) != len(shape):
        raise FormatError(
            f"tensor {name!r}: coordinates have shape {list(coordinates.shape)}, expected "
            f"[{len(shape)}, nnz] for shape {list(shape)}"
        )
    flat = np.zeros(coordinates.shape[1], np.int64)
    for size, axis in zip(shape, whole(name, coordinates), strict=True):
        if axis.size and (axis.min() < 0 or axis.max() >= size):
            bad = axis[(axis < 0) | (axis >= size)][0]
            raise FormatError(
                f"tensor {name!r}: coordinate {bad} is out of range for shape {list(shape)}; is "
                "this the base that the file was made of?"
            )
        flat = flat * size + axis.astype(np.int64)
    return flat


def whole(name: str, numbers: Array) -> Array:
    """Integers, as they are or from floats that hold them exactly (PEFT on Windows saves indices
    as float32, which rounds integers above 2^24); FormatError, naming the tensor, otherwise."""
    if numbers.dtype.kind in "iu":
        return numbers
    exact = numbers.dtype in (np.float32, np.float64)
    if not exact or not np.array_equal(numbers, np.floor(numbers)):
        raise FormatError(f"tensor {name!r}: indices are {numbers.dtype}, expected whole numbers")
    if numbers.dtype == np.float32 and numbers.size and np.abs(numbers).max() >= FLOAT32_EXACT:
        raise FormatError(
            f"tensor {name!r}: indices were saved as float32, which cannot tell those above "
            f"{FLOAT32_EXACT} apart; save the adapter again on another system than Windows"
        )
    return numbers.astype(np.int64)
